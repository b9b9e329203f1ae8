"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(
    x: jax.Array,  # [..., size]
    weight: jax.Array,  # [size]
    eps: float,
    *,
    offset: float = 0.0,  # added to the weight: 1 where checkpoints store its distance from 1
) -> jax.Array:  # [..., size], of x's type
    """Returns RMSNorm (https://arxiv.org/abs/1910.07467), computed in float32."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    wide_weight = weight.astype(jnp.float32) + offset
    wide_weight = wide_weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    return (wide * scale * wide_weight).astype(x.dtype)
