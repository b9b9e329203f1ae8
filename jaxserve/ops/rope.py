"""Rotary position embedding (https://arxiv.org/abs/2104.09864) and its long-context scalings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.errors import WeightError


@dataclass(frozen=True, kw_only=True)
class NoScaling:
    """Frequencies as trained."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class FactorScaling:
    """Each frequency divided by a factor of its own, as GGUF files store Llama 3.1's."""

    factors: tuple[float, ...]  # head_dim / 2


RopeScaling: TypeAlias = NoScaling | LinearScaling | Llama3Scaling | FactorScaling


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How fast positions turn."""

    theta: float
    scaling: RopeScaling


def rope_from_hf(config: dict[str, Any], default_theta: float) -> Rope:
    """Returns the rotation a Hugging Face config asks for; WeightError for one not supported."""
    parameters = config.get("rope_parameters") or {}
    theta = parameters.get("rope_theta", config.get("rope_theta", default_theta))
    return Rope(theta=float(theta), scaling=rope_scaling_from_hf(config))


def rope_scaling_from_hf(config: dict[str, Any]) -> RopeScaling:
    """Returns the scaling a Hugging Face config asks for; WeightError for one not supported."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    for source, key, handled in (
        (scaling, "mrope_section", None),
        (scaling, "partial_rotary_factor", 1.0),
        (config, "partial_rotary_factor", 1.0),
    ):
        if source.get(key) not in (None, handled):
            raise WeightError(f"config.json: {key} = {source[key]!r} is not supported")
    if factors := config.get("rope_frequency_factors"):
        return FactorScaling(factors=tuple(float(factor) for factor in factors))
    if kind == "default":
        return NoScaling()
    if kind == "linear":
        return LinearScaling(factor=float(scaling["factor"]))
    if kind == "llama3":
        return Llama3Scaling(
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_position=int(scaling["original_max_position_embeddings"]),
        )
    raise WeightError(
        f"config.json: rope scaling {kind!r} is not supported; supported: default, linear, llama3"
    )


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling
) -> np.ndarray:  # [head_dim / 2] f32
    """Returns the angle by which each pair of dimensions turns for one position."""
    # Float32 throughout, as the reference computes them: float64 would differ in the last bit.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)
    match scaling:
        case LinearScaling(factor=factor):
            return frequencies / np.float32(factor)
        case FactorScaling(factors=factors):
            return frequencies / np.asarray(factors, np.float32)
        case Llama3Scaling():
            return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    wavelength = 2 * math.pi / frequencies
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    blend = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    slowed = frequencies / scaling.factor
    blended = (1 - blend) * slowed + blend * frequencies
    scaled = np.where(wavelength > longest, slowed, blended)
    return np.where(wavelength < shortest, frequencies, scaled).astype(np.float32)


def rope_angles(
    positions: jax.Array,  # [tokens] i32
    frequencies: np.ndarray,  # [head_dim / 2] f32
) -> tuple[jax.Array, jax.Array]:  # [tokens, 2, head_dim / 2] f32 each
    """Returns the cosines of the positions' angles, and their sines as `apply_rope` adds them.

    Always float32: bfloat16 cannot tell position 257 from 256.
    """
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([cos, cos], axis=1), jnp.stack([-sin, sin], axis=1)


def apply_rope(
    x: jax.Array,  # [tokens, heads, head_dim]
    angles: tuple[jax.Array, jax.Array],  # [tokens, 2, head_dim / 2] f32, of `rope_angles`
) -> jax.Array:  # [tokens, heads, head_dim], of x's type
    """Rotates each pair (i, i + head_dim / 2), the order of Hugging Face checkpoints.

    Halves change places by a reversal: a concatenation would branch on every element on a CPU.
    """
    cos, sin = (part[:, None] for part in angles)
    halves = x.astype(jnp.float32).reshape(*x.shape[:2], 2, -1)
    rotated = halves * cos + halves[:, :, ::-1] * sin
    return rotated.reshape(x.shape).astype(x.dtype)
