"""Reads the scales of keys and values that some quantised checkpoints bring.

Host only: imports no jax.
"""

from __future__ import annotations

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import Checkpoint

# compressed-tensors; AutoFP8 and TensorRT's; compressed-tensors before 0.6.
_NAMES = (
    ("self_attn.k_scale", "self_attn.v_scale"),
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
)
KV_SCALE_NAMES = tuple(f".{name}" for pair in _NAMES for name in pair)
_LARGEST = {"float": 448.0, "int": 127.0}


def read_kv_peaks(checkpoint: Checkpoint, num_layers: int) -> np.ndarray | None:
    """Returns the largest key and value that each layer's scales allow for: [layers, 2] f32.

    None where the checkpoint has no scales; WeightError where only some layers do, or heads
    have scales of their own.
    """
    scheme = (checkpoint.config.get("quantization_config") or {}).get("kv_cache_scheme")
    scheme = scheme if isinstance(scheme, dict) else {}
    kind = scheme.get("type", "float")
    names = set(checkpoint.names)
    for pair in _NAMES:
        wanted = [f"model.layers.{layer}.{name}" for layer in range(num_layers) for name in pair]
        missing = [name for name in wanted if name not in names]
        if len(missing) == len(wanted):
            continue
        if missing:
            raise WeightError(
                f"the checkpoint lacks {missing[0]}, but has such scales of other layers"
            )
        if kind not in _LARGEST or scheme.get("num_bits", 8) != 8:
            raise WeightError(
                f"config.json: kv_cache_scheme = {str(scheme)[:80]} is not supported; supported: "
                "8 bit int, float"
            )
        scales = [checkpoint.read(name).astype(np.float32).reshape(-1) for name in wanted]
        for name, scale in zip(wanted, scales, strict=True):
            if scale.size != 1:
                raise WeightError(f"{name} has {scale.size} numbers; a layer has one scale")
            if not (np.isfinite(scale[0]) and scale[0] > 0):
                raise WeightError(f"{name} is {scale[0]}; a scale is positive")
        return np.concatenate(scales).reshape(num_layers, 2) * np.float32(_LARGEST[kind])
    return None
