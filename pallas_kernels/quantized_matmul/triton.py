"""Products with weights quantised by groups of columns, for NVIDIA GPUs in Pallas' Triton.

A program takes some rows of x and of the matrix, and walks the groups: the product of a group's
levels is scaled and added, and no float of the matrix leaves the registers. JAX has deprecated its
Triton lowering; where it is gone, `device_refusal` says so.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton
except ImportError:  # `device_refusal` says so
    triton = None  # type: ignore[assignment]

_LEAST_ROWS, _MOST_ROWS = 16, 64  # in a program
_BLOCK_OUT = 64


def device_refusal(device: jax.Device, dtype: jnp.dtype) -> str | None:
    """Returns why the kernel cannot run on a device with data of a type; None if it can."""
    major, _, minor = str(device.compute_capability).partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        return f"the kernel is for NVIDIA GPUs, not for {device.device_kind}"
    needed = (8, 9) if dtype == jnp.float8_e4m3fn else (8, 0)
    if (int(major), int(minor)) < needed:
        return f"{dtype.name} takes compute capability {needed[0]}.{needed[1]}"
    if triton is None:
        return f"jax {jax.__version__} has no Triton lowering any more"
    return None


def refusal(dtype: jnp.dtype, *, out_size: int, in_size: int, groups: int) -> str | None:
    """Returns why the kernel cannot multiply by such a matrix; None if it can."""
    del dtype
    size = in_size // groups
    if size not in (32, 64, 128) or out_size % _BLOCK_OUT:
        return (
            f"{groups} groups of {size} columns and {out_size} rows: groups must be of 32, 64 or "
            f"128 columns, rows a multiple of {_BLOCK_OUT}"
        )
    return None


def quantized_matmul(
    x: jax.Array,  # [rows, in]
    data: jax.Array,  # [out, in] int4, int8 or float8
    scale: jax.Array,  # [groups, out] f32
    zero: jax.Array | None,  # [groups, out] i8
    *,
    zero_steps: int,
    out_dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:  # [rows, out]
    """Returns the product of `api.quantized_matmul`."""
    rows, in_size = x.shape
    out_size, groups = data.shape[0], scale.shape[0]
    x = x.astype(jnp.bfloat16)
    if data.dtype == jnp.int4:  # two columns share a byte: the even ones, and the odd
        pairs = data.reshape(out_size, -1, 2)
        if interpret:  # a CPU has no such bytes
            low, high = (pairs[:, :, side].astype(jnp.int8) for side in range(2))
            data = (low & 15) | (high << 4)
        else:
            data = lax.bitcast_convert_type(pairs, jnp.int8)
        halves = [x[:, 0::2], x[:, 1::2]]
    else:
        halves = [x]
    block_rows = max(_LEAST_ROWS, min(_MOST_ROWS, 1 << (rows - 1).bit_length()))
    padded = -(-rows // block_rows) * block_rows
    halves = [jnp.pad(half, ((0, padded - rows), (0, 0))) for half in halves]
    operands = [data, scale]
    if zero is not None:
        # What zeros take away needs only x's sums.
        sums = x.astype(jnp.float32).reshape(rows, groups, -1).sum(2) / zero_steps
        operands += [zero, jnp.pad(sums.T, ((0, 0), (0, padded - rows)))]
    return pl.pallas_call(
        partial(
            _kernel,
            block_rows=block_rows,
            num_halves=len(halves),
            has_zero=zero is not None,
        ),
        out_shape=jax.ShapeDtypeStruct((padded, out_size), jnp.dtype(out_dtype)),
        grid=(out_size // _BLOCK_OUT, padded // block_rows),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="quantized_matmul",
    )(*halves, *operands)[:rows]


def _kernel(
    *refs: Any,  # x [rows, in], of int4 its even and its odd columns; then
    # data [out, in], of int4 [out, in / 2] in pairs
    # scale [groups, out] f32
    # zero [groups, out] i8 and sums [groups, rows] f32, if there are zeros
    # output [rows, out]
    block_rows: int,
    num_halves: int,
    has_zero: bool,
):
    halves, (data, scale, *zeros, out) = refs[:num_halves], refs[num_halves:]
    rows = pl.ds(pl.program_id(1) * block_rows, block_rows)
    columns = pl.ds(pl.program_id(0) * _BLOCK_OUT, _BLOCK_OUT)
    width = data.shape[1] // scale.shape[0]  # of a group, in `data`

    def visit(group, total):
        place = pl.ds(group * width, width)
        levels = data[columns, place]
        if num_halves == 1:
            parts = [levels]
        else:  # shifted up and down again, a level has its sign
            wide = levels.astype(jnp.int32)
            parts = [(wide << 28) >> 28, wide >> 4]
        product = jnp.zeros(total.shape, jnp.float32)
        for half, part in zip(halves, parts, strict=True):
            matrix = part.astype(jnp.float32).astype(jnp.bfloat16)
            product += jnp.dot(half[rows, place], matrix.T, preferred_element_type=jnp.float32)
        if has_zero:
            zero, sums = zeros
            product -= sums[group, rows][:, None] * zero[group, columns].astype(jnp.float32)[None]
        return total + product * scale[group, columns][None]

    total = jnp.zeros((block_rows, _BLOCK_OUT), jnp.float32)
    total = lax.fori_loop(0, scale.shape[0], visit, total)
    out[rows, columns] = total.astype(out.dtype)
