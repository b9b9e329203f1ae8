"""The contract of a grouped matrix product: shapes, their validation, the choice of backend."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import reference
from pallas_kernels.targets import TPU

Backend: TypeAlias = Literal["reference", "tpu"]


def grouped_matmul(
    lhs: jax.Array,  # [rows, in], rows of group 0 first, then those of group 1, and so on
    rhs: jax.Array,  # [groups, out, in], of floats; or of int8 or float8, with scales
    group_sizes: jax.Array,  # [groups] i32, rows of each group
    scale: jax.Array | None = None,  # [groups, out] f32, rhs times this is the matrix
    *,
    backend: Backend,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:  # [rows, out]
    """Returns each row's product with its group's matrix, `lhs[r] @ rhs[g].T`, summed in float32.

    Rows past the last group come out as zeros, whatever they hold. Products are of the type of
    rhs; where that is scaled, of the type of lhs. Raises ValueError at trace time for shapes that
    do not agree, and for what the backend cannot hold.
    """
    _check(lhs, rhs, group_sizes, scale)
    if backend == "reference":
        return reference.grouped_matmul(lhs, rhs, group_sizes, scale, out_dtype=out_dtype)
    assert backend == "tpu", backend
    # Not at the top: Pallas takes a second to import, and a CPU never needs it.
    from pallas_kernels.grouped_matmul import tpu

    return tpu.grouped_matmul(lhs, rhs, group_sizes, scale, out_dtype=out_dtype)


def device_refusal(backend: Backend, device: jax.Device) -> str | None:
    """Returns why a backend cannot run on its platform's device; None if it can."""
    if backend == "reference" or device.device_kind in TPU.device_kinds:
        return None
    return f"the TPU kernel is made for {', '.join(TPU.device_kinds)}, not {device.device_kind}"


def _check(
    lhs: jax.Array,  # [rows, in]
    rhs: jax.Array,  # [groups, out, in]
    group_sizes: jax.Array,  # [groups] i32
    scale: jax.Array | None,  # [groups, out] f32
) -> None:
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[2]:
        raise ValueError(f"{lhs.shape=} must be [rows, in] and {rhs.shape=} [groups, out, in]")
    if group_sizes.shape != rhs.shape[:1]:
        raise ValueError(f"{group_sizes.shape=} must be ({rhs.shape[0]},)")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"{group_sizes.dtype=} must be int32")
    if scale is not None and scale.shape != rhs.shape[:2]:
        raise ValueError(f"{scale.shape=} must be {rhs.shape[:2]}")
    if rhs.dtype.itemsize == 1 and scale is None:
        raise ValueError(f"rhs of {rhs.dtype.name} needs scales")
