"""Rewrites small checkpoints in the formats that quantised ones have, each beside its float twin.

The packing follows the packages that made the formats (AutoAWQ, AutoGPTQ, compressed-tensors), one
number at a time, so that it shares nothing with what reads it. Host only: imports no jax.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.checkpoints import folder_tensors, write_json, write_shards

Parts = dict[str, np.ndarray]
# Takes the matrix [out, in] and a generator; returns its parts and the floats they stand for.
Quantizer = Callable[[np.ndarray, np.random.Generator], tuple[Parts, np.ndarray]]


def write_quantized(
    source: Path,  # of `write_llama_folder`
    target: Path,
    config: dict[str, Any],  # quantization_config
    quantizer: Quantizer,
    extra: Parts | None = None,  # more tensors, such as scales of the KV cache
) -> Path:
    """Writes `source` quantised to `target`, and its float twin to `target`/twin.

    Layers' matrices are quantised; the embedding and the head are not. Returns the twin's path.
    """
    random = np.random.default_rng(7)
    quantized, twin = dict(extra or {}), {}
    for name, tensor in folder_tensors(source).items():
        if tensor.ndim != 2 or "proj" not in name:
            quantized[name] = twin[name] = tensor
            continue
        parts, dense = quantizer(tensor.astype(np.float32), random)
        twin[name] = np.ascontiguousarray(dense)  # safetensors writes memory as it lies
        stem = name.removesuffix(".weight")
        quantized |= {f"{stem}.{part}": np.ascontiguousarray(v) for part, v in parts.items()}
    for folder, tensors in ((target, quantized), (target / "twin", twin)):
        folder.mkdir(parents=True)
        for file in source.iterdir():
            if "safetensors" not in file.name:
                shutil.copy(file, folder)
        write_shards(folder, tensors, 2)
    model = json.loads((source / "config.json").read_text())
    write_json(target / "config.json", {**model, "quantization_config": config})
    return target / "twin"


def int8_channels(weight: np.ndarray, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
    """compressed-tensors' int-quantized, a scale for each row."""
    scale = np.abs(weight).max(1, keepdims=True) / 127
    data = np.round(weight / scale).astype(np.int8)
    return {"weight": data, "weight_scale": scale}, data * scale


def fp8_channels(weight: np.ndarray, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
    """compressed-tensors' float-quantized, a bfloat16 scale for each row."""
    scale = (np.abs(weight).max(1, keepdims=True) / 440).astype(ml_dtypes.bfloat16)
    data = (weight / scale.astype(np.float32)).astype(ml_dtypes.float8_e4m3fn)
    dense = data.astype(np.float32) * scale.astype(np.float32)
    return {"weight": data, "weight_scale": scale}, dense


def fp8_tensor(weight: np.ndarray, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
    """AutoFP8: one scale for the matrix, one for its inputs."""
    scale = np.float32(np.abs(weight).max() / 448)
    data = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    parts = {"weight": data, "weight_scale": scale.reshape(()), "input_scale": np.float32(0.01)}
    return {name: np.asarray(part) for name, part in parts.items()}, data.astype(np.float32) * scale


def fp8_blocks(size: int, marker: str = "weight_scale_inv") -> Quantizer:
    """Returns DeepSeek's: a scale for each block of `size` x `size`, blocks at the end smaller."""

    def quantize(weight: np.ndarray, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
        rows, columns = (-(-side // size) for side in weight.shape)
        scales = np.empty((rows, columns), np.float32)
        data = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
        dense = np.empty(weight.shape, np.float32)
        for row in range(rows):
            for column in range(columns):
                place = np.s_[row * size : (row + 1) * size, column * size : (column + 1) * size]
                scale = scales[row, column] = np.abs(weight[place]).max() / 448
                data[place] = (weight[place] / scale).astype(ml_dtypes.float8_e4m3fn)
                dense[place] = data[place].astype(np.float32) * scale
        return {"weight": data, marker: scales}, dense

    return quantize


def packed(bits: int, group: int, *, has_zero: bool = False) -> Quantizer:
    """Returns compressed-tensors' pack-quantized."""

    def quantize(weight: np.ndarray, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
        levels, scale, zero, dense = _levels(weight, bits, group, has_zero=has_zero)
        parts = {
            "weight_packed": _pack_rows(levels, bits),
            "weight_scale": scale,
            "weight_shape": np.array(weight.shape, np.int64),
        }
        if has_zero:
            parts["weight_zero_point"] = _pack_rows(zero.T, bits).T
        return parts, dense

    return quantize


def awq(group: int) -> Quantizer:
    """Returns AutoAWQ's gemm format, float16 scales."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # awq/modules/linear/gemm.py

    def pack(values: np.ndarray) -> np.ndarray:
        words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
        for word in range(words.shape[1]):
            for place in range(8):
                column = values[:, word * 8 + order[place]].astype(np.uint32)
                words[:, word] |= column << np.uint32(4 * place)
        return words.view(np.int32)

    def quantize(weight: np.ndarray, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
        levels, scale, zero, dense = _levels(weight, 4, group, has_zero=True, half=True)
        parts = {
            "qweight": pack(levels.T),
            "qzeros": pack(zero.T),
            "scales": scale.T.astype(np.float16),
        }
        return parts, dense

    return quantize


def gptq(
    bits: int,
    group: int,
    *,
    is_symmetric: bool,
    has_order: bool = False,
    zero_offset: int = 1,
    bias: float | None = None,  # AutoGPTQ writes one of zeros for every matrix
) -> Quantizer:
    """Returns AutoGPTQ's format, float16 scales."""

    def quantize(weight: np.ndarray, random: np.random.Generator) -> tuple[Parts, np.ndarray]:
        in_size = weight.shape[1]
        group_of = np.arange(in_size) // group
        if has_order:
            group_of = random.permutation(group_of)
        by_group = np.argsort(group_of, kind="stable")
        levels, scale, zero, dense = _levels(
            weight[:, by_group], bits, group, has_zero=not is_symmetric, half=True
        )
        restored, dense_restored = np.empty_like(levels), np.empty_like(dense)
        restored[:, by_group], dense_restored[:, by_group] = levels, dense
        parts = {
            "qweight": _pack_rows(restored, bits).T,
            "qzeros": _pack_rows(zero.T - zero_offset, bits),
            "scales": scale.T.astype(np.float16),
            "g_idx": group_of.astype(np.int32),
        }
        if bias is not None:
            parts["bias"] = np.full(len(weight), bias, np.float16)
        return parts, dense_restored

    return quantize


def _levels(
    weight: np.ndarray, bits: int, group: int, *, has_zero: bool, half: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns unsigned levels [out, in], scales and zeros [out, groups], and the floats."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    groups = weight.reshape(len(weight), -1, group)
    if has_zero:
        scale = (groups.max(2) - groups.min(2)) / top
        zero = np.clip(np.round(-groups.min(2) / scale), 1, top).astype(np.int64)
    else:
        scale = np.abs(groups).max(2) / (middle - 1)
        zero = np.full(scale.shape, middle, np.int64)
    scale = scale.astype(np.float16 if half else np.float32).astype(np.float32)
    levels = np.clip(np.round(groups / scale[:, :, None]) + zero[:, :, None], 0, top)
    dense = ((levels - zero[:, :, None]) * scale[:, :, None]).astype(np.float32)
    return levels.reshape(weight.shape).astype(np.int64), scale, zero, dense.reshape(weight.shape)


def _pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs unsigned values [rows, columns] into words along columns, low bits first."""
    per_word = 32 // bits
    words = np.zeros((len(values), values.shape[1] // per_word), np.uint32)
    for word in range(words.shape[1]):
        for place in range(per_word):
            column = values[:, word * per_word + place].astype(np.uint32)
            words[:, word] |= column << np.uint32(bits * place)
    return words.view(np.int32)
