"""The contract of a product with a quantised weight: shapes, validation, the choice of backend."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import reference

Backend: TypeAlias = Literal["reference", "tpu", "triton"]


def quantized_matmul(
    x: jax.Array,  # [rows, in]
    data: jax.Array,  # [out, in] int4, int8 or float8
    scale: jax.Array,  # [groups, out] f32
    zero: jax.Array | None = None,  # [groups, out] i8
    *,
    backend: Backend,
    zero_steps: int = 1,  # what number in `zero` stands for one level of `data`
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:  # [rows, out]
    """Returns `x @ weight.T`, summed in float32.

    Entry [o, i] of the weight is `(data[o, i] - zero[g, o] / zero_steps) * scale[g, o]`, where g is
    the group of as many columns as the others that i is in. Raises ValueError at trace time for
    shapes that do not agree, and for those that `refusal` names.
    """
    out_size, in_size = data.shape
    groups = scale.shape[0]
    if x.ndim != 2 or x.shape[1] != in_size:
        raise ValueError(f"{x.shape=} does not go with {data.shape=}")
    if scale.shape != (groups, out_size) or in_size % groups:
        raise ValueError(f"{scale.shape=} does not go with {data.shape=}")
    if zero is not None and zero.shape != scale.shape:
        raise ValueError(f"{zero.shape=} must be {scale.shape}")
    if reason := refusal(backend, data.dtype, out_size=out_size, in_size=in_size, groups=groups):
        raise ValueError(reason)
    multiply = _module(backend).quantized_matmul
    return multiply(x, data, scale, zero, zero_steps=zero_steps, out_dtype=out_dtype)


def refusal(
    backend: Backend, dtype: jnp.dtype, *, out_size: int, in_size: int, groups: int
) -> str | None:
    """Returns why a backend cannot multiply by a matrix `[out, in]`; None if it can."""
    return _module(backend).refusal(dtype, out_size=out_size, in_size=in_size, groups=groups)


def device_refusal(backend: Backend, device: jax.Device, dtype: jnp.dtype) -> str | None:
    """Returns why a backend cannot run on its platform's device with data of a type, or None."""
    return _module(backend).device_refusal(device, dtype)


def _module(backend: Backend) -> Any:
    # Not at the top: Pallas takes a second to import, and a CPU never needs it.
    match backend:
        case "tpu":
            from pallas_kernels.quantized_matmul import tpu

            return tpu
        case "triton":
            from pallas_kernels.quantized_matmul import triton

            return triton
        case _:
            assert backend == "reference", backend
            return reference
