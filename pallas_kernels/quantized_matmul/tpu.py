"""Products with weights quantised by groups of columns, for TPUs in Pallas.

A group's scale belongs to products of its own columns only, and a matrix unit sums over 128 columns
or more. Few rows: each is laid out once for every group of a chunk, zeros elsewhere, so that one
product of the stored levels gives the groups' sums apart; they are scaled and added. Many rows: a
block of the matrix is dequantised in VMEM, where all rows meet it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.targets import TPU, TpuTarget

LANES, SUBLANES = 128, 8
_FEW_ROWS = 64  # above, dequantising costs less than a row for each group of a chunk
_FEW_BLOCK_OUT = 512
_MANY_BLOCK_OUT, _MANY_BLOCK_ROWS = 256, 256


def quantized_matmul(
    x: jax.Array,  # [rows, in]
    data: jax.Array,  # [out, in] int4, int8 or float8
    scale: jax.Array,  # [groups, out] f32
    zero: jax.Array | None,  # [groups, out] i8
    *,
    zero_steps: int,
    out_dtype: jax.typing.DTypeLike,
    target: TpuTarget = TPU,
    interpret: Any = False,  # True or pltpu.InterpretParams: on a CPU, for tests
) -> jax.Array:  # [rows, out]
    """Returns the product of `api.quantized_matmul`."""
    rows = x.shape[0]
    multiply = _multiply_few if rows <= _FEW_ROWS else _multiply_many
    block_rows = 16 if rows <= _FEW_ROWS else _MANY_BLOCK_ROWS
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, -rows % block_rows), (0, 0)))
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=target.vmem_bytes
    )
    out = multiply(
        x,
        data,
        scale,
        zero,
        zero_steps,
        out_dtype=jnp.dtype(out_dtype),
        compiler_params=params,
        interpret=interpret,
    )
    return out[:rows]


def device_refusal(device: jax.Device, dtype: jnp.dtype) -> str | None:
    """Returns why the kernels cannot run on a TPU; None if they can, with data of any type."""
    del dtype
    if device.device_kind in TPU.device_kinds:
        return None
    return f"the TPU kernels are made for {', '.join(TPU.device_kinds)}, not {device.device_kind}"


def refusal(
    dtype: jnp.dtype, *, out_size: int, in_size: int, groups: int, target: TpuTarget = TPU
) -> str | None:
    """Returns why the kernels cannot multiply by such a matrix; None if they can."""
    size = in_size // groups
    if size not in (32, 64, 128) or groups % SUBLANES or out_size % LANES:
        return (
            f"{groups} groups of {size} columns and {out_size} rows: groups must be of 32, 64 or "
            f"128 columns and a multiple of {SUBLANES}, rows a multiple of {LANES}"
        )
    taken = _vmem_bytes(dtype, out_size=out_size, in_size=in_size, groups=groups)
    if taken > target.vmem_bytes:
        return f"rows of {in_size} take {taken} bytes of VMEM; there are {target.vmem_bytes}"
    return None


def _vmem_bytes(dtype: jnp.dtype, *, out_size: int, in_size: int, groups: int) -> int:
    """Returns what the greedier of the kernels holds, with zeros, and two of what moves."""
    bits = 4 if dtype == jnp.int4 else 8
    few_out, many_out = _block_out(out_size, _FEW_BLOCK_OUT), _block_out(out_size, _MANY_BLOCK_OUT)
    parts = LANES * groups // in_size
    few = 2 * _FEW_ROWS * parts * in_size + few_out * in_size * bits // 8 + 5 * groups * few_out
    many = 2 * _MANY_BLOCK_ROWS * in_size + many_out * in_size * bits // 8 + 5 * groups * many_out
    dense = 2 * many_out * in_size + 4 * groups * many_out
    results = 4 * max(_FEW_ROWS * few_out, _MANY_BLOCK_ROWS * many_out)
    return 2 * results + max(2 * few, 2 * many + dense)


def _multiply_few(
    x: jax.Array,  # [rows, in] bf16
    data: jax.Array,  # [out, in]
    scale: jax.Array,  # [groups, out] f32
    zero: jax.Array | None,  # [groups, out] i8
    zero_steps: int,
    *,
    out_dtype: jnp.dtype,
    **options: Any,  # of `pallas_call`
) -> jax.Array:  # [rows, out]
    rows, in_size = x.shape
    out_size, groups = data.shape[0], scale.shape[0]
    parts = LANES * groups // in_size  # groups in a chunk of 128 columns
    block_out = _block_out(out_size, _FEW_BLOCK_OUT)
    chunks = x.reshape(rows, -1, LANES).transpose(1, 0, 2)[:, None]
    lane = jnp.arange(LANES, dtype=jnp.int32)
    part = jnp.arange(parts, dtype=jnp.int32)
    is_own = (lane * parts // LANES)[None, :] == part[:, None]
    spread = jnp.where(is_own[None, :, None], chunks, jnp.zeros((), x.dtype))
    spread = spread.reshape(-1, parts * rows, LANES)
    operands = [spread, data, scale]
    in_specs = [
        pl.BlockSpec(spread.shape, lambda out, _: (0, 0, 0)),
        pl.BlockSpec((block_out, in_size), lambda out, _: (out, 0)),
        pl.BlockSpec((groups, block_out), lambda out, _: (0, out)),
    ]
    if zero is not None:
        # What zeros take away needs only x's sums.
        column = jnp.arange(in_size, dtype=jnp.int32)[None, :]
        group = jnp.arange(groups, dtype=jnp.int32)[:, None]
        ones = (column * groups // in_size == group).astype(x.dtype)
        sums = _dot(x, ones) / zero_steps
        operands += [zero, sums]
        in_specs += [
            pl.BlockSpec((groups, block_out), lambda out, _: (0, out)),
            pl.BlockSpec((rows, groups), lambda out, _: (0, 0)),
        ]
    return pl.pallas_call(
        functools.partial(_few_kernel, rows=rows, parts=parts, has_zero=zero is not None),
        out_shape=jax.ShapeDtypeStruct((rows, out_size), out_dtype),
        grid=(out_size // block_out, 1),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((rows, block_out), lambda out, _: (0, out)),
        name="quantized_matmul",
        **options,
    )(*operands)


def _few_kernel(
    # inputs
    x_ref,  # [chunks, parts * rows, LANES] bf16
    data_ref,  # [block_out, in]
    scale_ref,  # [groups, block_out] f32
    *refs,  # zero [groups, block_out] i8, sums [rows, groups] f32, if any; out [rows, block_out]
    rows: int,
    parts: int,
    has_zero: bool,
):
    out_ref = refs[-1]
    chunks = SUBLANES // parts  # whose scales fill a register

    def visit(index, total):
        scales = scale_ref[pl.ds(index * SUBLANES, SUBLANES), :]
        for offset in range(chunks):
            chunk = index * chunks + offset
            levels = _widened(data_ref[:, pl.ds(chunk * LANES, LANES)])
            product = _dot(x_ref[chunk], levels)
            for part in range(parts):
                own = product[part * rows : (part + 1) * rows]
                place = offset * parts + part
                total = total + own * scales[place : place + 1]
        return total

    total = jnp.zeros(out_ref.shape, jnp.float32)
    total = lax.fori_loop(0, scale_ref.shape[0] // SUBLANES, visit, total)
    if has_zero:
        zero_ref, sums_ref = refs[:2]
        zeros = zero_ref[...].astype(jnp.float32) * scale_ref[...]
        total -= lax.dot_general(
            sums_ref[...], zeros, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
        )
    out_ref[...] = total.astype(out_ref.dtype)


def _multiply_many(
    x: jax.Array,  # [rows, in] bf16
    data: jax.Array,  # [out, in]
    scale: jax.Array,  # [groups, out] f32
    zero: jax.Array | None,  # [groups, out] i8
    zero_steps: int,
    *,
    out_dtype: jnp.dtype,
    **options: Any,  # of `pallas_call`
) -> jax.Array:  # [rows, out]
    rows, in_size = x.shape
    out_size, groups = data.shape[0], scale.shape[0]
    block_out = _block_out(out_size, _MANY_BLOCK_OUT)
    by_group = pl.BlockSpec((groups, block_out), lambda out, row: (0, out))
    scratch = [pltpu.VMEM((block_out, in_size), jnp.bfloat16)]
    operands, in_specs = (
        [x, data, scale],
        [
            pl.BlockSpec((_MANY_BLOCK_ROWS, in_size), lambda out, row: (row, 0)),
            pl.BlockSpec((block_out, in_size), lambda out, row: (out, 0)),
            by_group,
        ],
    )
    if zero is not None:
        operands, in_specs = [*operands, zero], [*in_specs, by_group]
        scratch.append(pltpu.VMEM((groups, block_out), jnp.float32))
    return pl.pallas_call(
        functools.partial(_many_kernel, zero_steps=zero_steps, has_zero=zero is not None),
        out_shape=jax.ShapeDtypeStruct((rows, out_size), out_dtype),
        grid=(out_size // block_out, rows // _MANY_BLOCK_ROWS),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((_MANY_BLOCK_ROWS, block_out), lambda out, row: (row, out)),
        scratch_shapes=scratch,
        name="quantized_matmul",
        **options,
    )(*operands)


def _many_kernel(
    # inputs
    x_ref,  # [block_rows, in] bf16
    data_ref,  # [block_out, in]
    scale_ref,  # [groups, block_out] f32
    *refs,  # zero [groups, block_out] i8, if any; out [block_rows, block_out] f32; and scratch:
    # [block_out, in] bf16, the block dequantised; and if there are zeros, [groups, block_out] f32
    zero_steps: int,
    has_zero: bool,
):
    zero_ref, out_ref, dense_ref, zeros_ref = refs if has_zero else (None, *refs, None)
    groups = scale_ref.shape[0]
    width = SUBLANES * data_ref.shape[1] // groups  # of the groups whose scales fill a register

    @pl.when(pl.program_id(1) == 0)
    def _dequantize():
        if has_zero:  # of 8 bits only 32 rows at a time are read from anywhere
            zeros_ref[...] = zero_ref[...].astype(jnp.float32)
        # Scales lie along rows of the matrix. A product with ones lays them along its columns.
        column = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 1)
        group = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)
        ones = jnp.where(column * SUBLANES // width == group, 1.0, 0.0).astype(jnp.bfloat16)

        def across(values):  # [SUBLANES, block_out] bf16 -> [block_out, width] f32
            return lax.dot_general(
                values, ones, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        def visit(index, _):
            some = pl.ds(pl.multiple_of(index * SUBLANES, SUBLANES), SUBLANES)
            place = (slice(None), pl.ds(pl.multiple_of(index * width, LANES), width))
            scales = scale_ref[some, :]
            rounded = scales.astype(jnp.bfloat16)
            rest = (scales - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
            levels = _widened(data_ref[place]).astype(jnp.float32)
            if has_zero:
                levels -= across(zeros_ref[some, :].astype(jnp.bfloat16)) * (1 / zero_steps)
            dense = levels * (across(rounded) + across(rest))
            dense_ref[place] = dense.astype(jnp.bfloat16)
            return ()

        lax.fori_loop(0, groups // SUBLANES, visit, ())

    out_ref[...] = _dot(x_ref[...], dense_ref[...]).astype(out_ref.dtype)


def _widened(levels: jax.Array) -> jax.Array:
    """Returns stored levels in bfloat16, which holds them all."""
    if jnp.issubdtype(levels.dtype, jnp.integer):
        levels = levels.astype(jnp.int32).astype(jnp.float32)
    return levels.astype(jnp.bfloat16)


def _dot(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _block_out(out_size: int, most: int) -> int:
    """Returns the largest multiple of 128 up to `most` that divides `out_size`."""
    return max(size for size in range(LANES, most + 1, LANES) if out_size % size == 0)
