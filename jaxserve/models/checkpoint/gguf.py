"""Reads a GGUF file as a Hugging Face checkpoint: names, layout and configuration translated.

Host only: imports no jax.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import Index
from jaxserve.models.checkpoint.files import bounds_of, open_binary, read_part
from jaxserve.models.checkpoint.gguf_families import (
    END_TOKENS,
    EXPERT_FAMILIES,
    FAMILIES,
    SAMPLING,
    Family,
)
from jaxserve.models.checkpoint.gguf_header import Header, TensorInfo, gguf_package, read_header

ROPE_FREQUENCIES = "rope_freqs.weight"
_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}
# Rows are dequantised in pieces, because gguf's working memory is several times its output.
_PIECE_ELEMENTS = 2**20
_CONTROL = 3  # tokenizer.ggml.token_type


class GgufCheckpoint:
    """An opened GGUF file. See `Checkpoint`; the file stays open until `close`.

    `config` also holds `rope_frequency_factors` where the file has them (Llama 3.1's long
    context): a list of head_dim / 2 divisors; frequency i is rope_theta ** (-2i / head_dim)
    divided by factor i. It replaces `rope_scaling`, whose parameters GGUF does not keep.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, size = open_binary(path)
        try:
            header = read_header(self._file, size, path)
            family = family_of(header.metadata, path)
            self._tensors = _renamed(header, family, path)
            self.config = build_config(header, family, path)
            self._add_frequency_factors(header)
            self._heads = _interleaved_heads(header, family, self.config, path)
            self._raised = family.raised
        except BaseException:
            self._file.close()
            raise
        self.generation_config = build_generation_config(header.metadata, self.config)
        self.names = tuple(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; `read` must not be called after."""
        self._file.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole tensor."""
        return self._info(name).shape

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns the tensor, or the part that `index` names; quantised types as float32."""
        info = self._info(name)
        bounds = bounds_of(index, info.shape)
        if _template_of(info.name)[0].removesuffix(".weight") in self._raised:
            return self._read_rows(info, bounds).astype(np.float32) - np.float32(1)
        heads = self._heads.get(info.name)
        if heads is None:
            return self._read_rows(info, bounds)
        # A permuted row comes from elsewhere in its head, so whole heads are read and cut.
        head_dim = info.shape[0] // heads
        start, stop = bounds[0]
        first = start // head_dim * head_dim
        last = -(-stop // head_dim) * head_dim
        whole = self._read_rows(info, [(first, last), *bounds[1:]])
        halves = whole.reshape(-1, head_dim // 2, 2, *whole.shape[1:]).swapaxes(1, 2)
        return np.ascontiguousarray(halves.reshape(whole.shape)[start - first : stop - first])

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise WeightError(f"{self._path}: has no tensor for {name!r}")
        return self._tensors[name]

    def _read_rows(self, info: TensorInfo, bounds: list[tuple[int, int]]) -> np.ndarray:
        where = f"{self._path}: tensor {info.name!r}"
        if info.type.name in _PLAIN:
            dtype = _PLAIN[info.type.name]
            return read_part(self._file, info.offset, info.shape, dtype, bounds, where)
        block, block_bytes = gguf_package().GGML_QUANT_SIZES[info.type]
        start, stop = bounds[-1]
        blocks = (start // block, -(-stop // block))
        stored = read_part(
            self._file,
            info.offset,
            (*info.shape[:-1], info.shape[-1] // block),
            np.dtype((np.void, block_bytes)),
            [*bounds[:-1], blocks],
            where,
        )
        columns = stored.shape[-1] * block
        whole = dequantize(stored.reshape(-1), info.type).reshape(*stored.shape[:-1], columns)
        skip = start - blocks[0] * block
        if whole.shape[-1] == stop - start:
            return whole
        return np.ascontiguousarray(whole[..., skip : skip + stop - start])

    def _add_frequency_factors(self, header: Header) -> None:
        info = header.tensors.get(ROPE_FREQUENCIES)
        if info is None:
            return
        half = self.config["head_dim"] // 2
        factors = self._read_rows(info, bounds_of(None, info.shape)).astype(np.float64).ravel()
        if factors.shape != (half,) or not (np.isfinite(factors).all() and (factors > 0).all()):
            raise WeightError(
                f"{self._path}: tensor {ROPE_FREQUENCIES!r}: expected {half} positive numbers"
            )
        self.config["rope_frequency_factors"] = factors.tolist()


def dequantize(
    blocks: np.ndarray,  # [blocks] of `block_bytes` raw bytes each
    kind: Any,  # gguf.GGMLQuantizationType
) -> np.ndarray:  # [blocks * block size] f32
    """Returns the values of quantised blocks."""
    package = gguf_package()
    size, _ = package.GGML_QUANT_SIZES[kind]
    out = np.empty(len(blocks) * size, np.float32)
    step = max(1, _PIECE_ELEMENTS // size)
    for first in range(0, len(blocks), step):
        piece = blocks[first : first + step]
        # As one row: gguf works through rows 16 at a time, at a cost for each call.
        raw = piece.view(np.uint8).reshape(1, -1)
        out[first * size : (first + len(piece)) * size] = package.quants.dequantize(raw, kind)[0]
    return out


def family_of(metadata: dict[str, Any], path: Path) -> Family:
    """Returns the row of `FAMILIES` for the file's architecture."""
    if metadata.get("split.count", 1) not in (0, 1):
        raise WeightError(f"{path}: one part of a split GGUF; join the parts with llama-gguf-split")
    architecture = metadata.get("general.architecture")
    has_experts = bool(metadata.get(f"{architecture}.expert_count", 0))
    families = EXPERT_FAMILIES if has_experts else FAMILIES
    if not isinstance(architecture, str) or architecture not in families:
        raise WeightError(
            f"{path}: GGUF architecture {architecture!r} {'with' if has_experts else 'without'} "
            f"experts is not supported (supported: {', '.join(families)})"
        )
    return families[architecture]


def build_config(header: Header, family: Family, path: Path) -> dict[str, Any]:
    """Returns the contents that config.json would have, from the metadata and the tensors."""
    metadata, prefix = header.metadata, header.metadata["general.architecture"] + "."
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.constants,
    }
    for key, name in family.config.items():
        config[name] = _number(metadata, prefix + key, path)
    for key, name in family.optional.items():
        if prefix + key in metadata:
            config[name] = _number(metadata, prefix + key, path)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    config["num_key_value_heads"] = _number(
        metadata, prefix + "attention.head_count_kv", path, heads
    )
    config["head_dim"] = _number(metadata, prefix + "attention.key_length", path, hidden // heads)
    config.update(family.derived(config))
    config["rope_theta"] = _number(metadata, prefix + "rope.freq_base", path, 10000.0)
    rotary = _number(metadata, prefix + "rope.dimension_count", path, config["head_dim"])
    if rotary != config["head_dim"]:
        raise WeightError(
            f"{path}: {prefix}rope.dimension_count {rotary} differs from the head size "
            f"{config['head_dim']}; partial rotation is not supported"
        )
    config["rope_scaling"] = _rope_scaling(metadata, prefix, path)
    config["vocab_size"] = _vocab_size(header, path)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    config.update(_token_ids(metadata, config["vocab_size"], path))
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(
        header.tensors["token_embd.weight"].type.name
    )
    if dtype is not None:
        config["torch_dtype"] = dtype
    return config


def build_generation_config(metadata: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents that generation_config.json would have."""
    found = {name: metadata[key] for key, name in SAMPLING.items() if key in metadata}
    if found:
        found["do_sample"] = found.get("temperature", 1.0) > 0
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {**{key: config[key] for key in ids if config[key] is not None}, **found}


def _number(metadata: dict[str, Any], key: str, path: Path, default: Any = None) -> Any:
    value = metadata.get(key, default)
    if isinstance(value, np.ndarray):
        raise WeightError(f"{path}: metadata {key!r} differs between layers; not supported")
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise WeightError(f"{path}: metadata {key!r} must be a positive number, got {value!r}")
    return value


def _rope_scaling(metadata: dict[str, Any], prefix: str, path: Path) -> dict[str, Any] | None:
    kind = metadata.get(prefix + "rope.scaling.type", "none")
    old = prefix + "rope.scale_linear"
    if kind == "none" and old not in metadata:
        return None
    if kind not in ("none", "linear"):
        raise WeightError(f"{path}: rope scaling {kind!r} is not supported (linear is)")
    key = old if kind == "none" else prefix + "rope.scaling.factor"
    factor = float(_number(metadata, key, path))
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _vocab_size(header: Header, path: Path) -> int:
    info = header.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise WeightError(f"{path}: tensor 'token_embd.weight' is missing or not a matrix")
    return info.shape[0]


def _token_ids(metadata: dict[str, Any], vocab_size: int, path: Path) -> dict[str, Any]:
    def token_id(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
            raise WeightError(f"{path}: metadata {key!r} is {value!r}, not below {vocab_size}")
        return value

    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = metadata.get("tokenizer.ggml.token_type", [])
    marked = [
        token
        for token, (text, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == _CONTROL and text in END_TOKENS
    ]
    named = [token_id("eos"), token_id("eot"), token_id("eom")]
    # The first is the file's own end of text; the others end a turn or a tool call.
    ends = list(dict.fromkeys(token for token in [*named, *marked] if token is not None))
    return {
        "bos_token_id": token_id("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": token_id("padding"),
    }


def _renamed(header: Header, family: Family, path: Path) -> dict[str, TensorInfo]:
    # Returns Hugging Face name -> tensor, refusing types and names that cannot be read.
    tensors = {}
    for name, info in header.tensors.items():
        if not _can_read(info):
            raise WeightError(f"{path}: tensor {name!r}: type {info.type.name} cannot be read")
        if name == ROPE_FREQUENCIES:
            continue
        template, layer = _template_of(name)
        stem, _, kind = template.rpartition(".")
        if stem not in family.names or kind not in ("weight", "bias"):
            raise WeightError(
                f"{path}: tensor {name!r} has no place in a {family.model_type} model"
            )
        tensors[f"{family.names[stem].replace('{i}', layer)}.{kind}"] = info
    return tensors


def _template_of(name: str) -> tuple[str, str]:
    # "blk.12.attn_q.weight" -> ("blk.{i}.attn_q.weight", "12")
    match = re.match(r"blk\.(0|[1-9]\d*)\.", name)
    if match is None:
        return name, ""
    return "blk.{i}." + name[match.end() :], match[1]


def _can_read(info: TensorInfo) -> bool:
    if info.type.name in _PLAIN:
        return True
    package = gguf_package()
    _, block_bytes = package.GGML_QUANT_SIZES[info.type]
    try:
        package.quants.dequantize(np.zeros((1, block_bytes), np.uint8), info.type)
    except NotImplementedError:
        return False
    return True


def _interleaved_heads(
    header: Header, family: Family, config: dict[str, Any], path: Path
) -> dict[str, int]:
    # Returns GGUF name -> number of heads, for the tensors whose rows are interleaved.
    found = {}
    for name, info in header.tensors.items():
        key = family.interleaved.get(_template_of(name)[0].rpartition(".")[0])
        if key is None:
            continue
        heads = config[key]
        if info.shape[0] != heads * config["head_dim"] or config["head_dim"] % 2:
            raise WeightError(
                f"{path}: tensor {name!r}: {info.shape[0]} rows do not make {heads} heads "
                f"of {config['head_dim']}"
            )
        found[name] = heads
    return found
