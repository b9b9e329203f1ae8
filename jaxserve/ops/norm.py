"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(
    x: jax.Array,  # [rows, hidden]
    weight: jax.Array,  # [hidden]
    eps: float,
) -> jax.Array:  # [rows, hidden], of x's type
    """Returns RMSNorm (https://arxiv.org/abs/1910.07467), computed in float32."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)[None, :]).astype(x.dtype)
