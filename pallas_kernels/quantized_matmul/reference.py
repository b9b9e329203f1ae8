"""Products with weights quantised by groups, in XLA: each group's is scaled, then all summed."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def device_refusal(device: jax.Device, dtype: jnp.dtype) -> str | None:
    """Returns None: plain XLA runs anywhere."""
    del device, dtype
    return None


def refusal(dtype: jnp.dtype, *, out_size: int, in_size: int, groups: int) -> str | None:
    """Returns None: any matrix will do."""
    del dtype, out_size, in_size, groups
    return None


def quantized_matmul(
    x: jax.Array,  # [rows, in]
    data: jax.Array,  # [out, in]
    scale: jax.Array,  # [groups, out] f32
    zero: jax.Array | None,  # [groups, out] i8
    *,
    zero_steps: int,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:  # [rows, out]
    """Returns the product of `api.quantized_matmul`."""
    groups = scale.shape[0]
    parts = x.reshape(x.shape[0], groups, -1)
    levels = data.astype(x.dtype).reshape(data.shape[0], groups, -1)
    products = jnp.einsum("rgc,ogc->gro", parts, levels, preferred_element_type=jnp.float32)
    out = (products * scale[:, None, :]).sum(0)
    if zero is not None:
        # (data - zero) * scale * x, summed: what zeros take away needs only x's sums.
        sums = parts.astype(jnp.float32).sum(2)
        zeros = zero.astype(jnp.float32) / zero_steps
        out -= jnp.einsum("rg,go->ro", sums, zeros * scale)
    return out.astype(out_dtype)
