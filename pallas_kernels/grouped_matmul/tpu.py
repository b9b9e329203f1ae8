"""Grouped matrix products for TPUs in Pallas: a grid of visits, each a tile of rows and one group.

Tiles are of fixed rows, groups begin anywhere. A visit multiplies a whole tile by its group's
matrix and keeps the rows that are the group's; a tile with rows of three groups has three visits,
one after the other, during which its results stay in VMEM. Consecutive visits of one group keep its
matrix there: each matrix that has rows is read once, and no other.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.targets import TPU, TpuTarget

LANES = 128
_LEAST_ROWS, _MOST_ROWS = 16, 256  # in a tile; 16 rows of bfloat16 fill a register
_MATRIX_BYTES = 4 * 2**20  # of a matrix, as much as is in VMEM at a time


def grouped_matmul(
    lhs: jax.Array,  # [rows, in]
    rhs: jax.Array,  # [groups, out, in]
    group_sizes: jax.Array,  # [groups] i32
    scale: jax.Array | None,  # [groups, out] f32
    *,
    out_dtype: jax.typing.DTypeLike,
    target: TpuTarget = TPU,
    block_rows: int | None = None,  # None: by the rows of a group
    interpret: Any = False,  # True or pltpu.InterpretParams: on a CPU, for tests
) -> jax.Array:  # [rows, out]
    """Returns the products of `api.grouped_matmul`. Raises ValueError for what VMEM cannot hold."""
    rows, in_size = lhs.shape
    groups, out_size, _ = rhs.shape
    lhs = lhs.astype(rhs.dtype if scale is None else _wide(lhs.dtype))
    block_rows = block_rows or _block_rows(rows, groups)
    block_out = _block_out(out_size, in_size * rhs.dtype.itemsize)
    out_dtype = jnp.dtype(out_dtype)
    _check_vmem(
        lhs.dtype,
        rhs.dtype,
        out_dtype,
        block_rows=block_rows,
        block_out=block_out,
        in_size=in_size,
        target=target,
    )
    num_tiles = -(-rows // block_rows)
    visits = _visits(group_sizes, rows, block_rows)
    group, tile, bounds, counts = visits
    lhs = jnp.pad(lhs, ((0, num_tiles * block_rows - rows), (0, 0)))

    def rhs_index(out: Any, visit: Any, group: Any, *_: Any) -> tuple[Any, ...]:
        return (group[visit], out, 0)

    operands = [lhs, rhs]
    in_specs = [
        pl.BlockSpec((block_rows, in_size), lambda out, visit, group, tile, *_: (tile[visit], 0)),
        pl.BlockSpec((None, block_out, in_size), rhs_index),
    ]
    if scale is not None:
        operands.append(scale[:, None, :])
        in_specs.append(
            pl.BlockSpec((None, 1, block_out), lambda out, visit, group, *_: (group[visit], 0, out))
        )
    out = pl.pallas_call(
        functools.partial(_multiply, block_rows=block_rows, has_scale=scale is not None),
        out_shape=jax.ShapeDtypeStruct((num_tiles * block_rows, out_size), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            # Visits inside: a tile's results stay in VMEM from one of its visits to the next.
            grid=(-(-out_size // block_out), group.shape[0]),
            in_specs=in_specs,
            out_specs=pl.BlockSpec(
                (block_rows, block_out), lambda out, visit, group, tile, *_: (tile[visit], out)
            ),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=target.vmem_bytes,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(group, tile, bounds, counts, *operands)
    return out[:rows]


def _multiply(
    # inputs
    group_ref,  # [visits] i32
    tile_ref,  # [visits] i32
    bounds_ref,  # [groups + 1] i32, where each group's rows begin
    counts_ref,  # [2] i32: visits of groups; and with those of tiles that have no group
    lhs_ref,  # [block_rows, in]
    rhs_ref,  # [block_out, in]
    *refs,  # scale [1, block_out] f32, if there is one; output [block_rows, block_out]
    block_rows: int,
    has_scale: bool,
):
    visit = pl.program_id(1)
    scale_ref, out_ref = refs if has_scale else (None, *refs)
    tile, group = tile_ref[visit], group_ref[visit]

    @pl.when((visit == 0) | (tile_ref[jnp.maximum(visit - 1, 0)] != tile))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(visit < counts_ref[0])
    def _():
        product = lax.dot_general(
            lhs_ref[...],
            rhs_ref[...].astype(lhs_ref.dtype),
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST if lhs_ref.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        if scale_ref is not None:
            product = product * scale_ref[...]
        row = tile * block_rows + lax.broadcasted_iota(jnp.int32, (block_rows, 1), 0)
        is_own = (row >= bounds_ref[group]) & (row < bounds_ref[group + 1])
        out_ref[...] = jnp.where(is_own, product.astype(out_ref.dtype), out_ref[...])


def _visits(
    group_sizes: jax.Array,  # [groups] i32
    rows: int,
    block_rows: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns each visit's group and tile, where groups begin, and the counts of `_multiply`.

    After the visits of groups come those of tiles that have none, for their zeros; the rest of the
    grid repeats the last visit, which costs no copy.
    """
    groups = group_sizes.shape[0]
    num_tiles = -(-rows // block_rows)
    ends = jnp.minimum(jnp.cumsum(group_sizes), rows)
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    first, last = bounds[:-1] // block_rows, (ends - 1) // block_rows
    count = jnp.where(ends > bounds[:-1], last - first + 1, 0)
    visit_ends = jnp.cumsum(count)
    num_used = -(-ends[-1] // block_rows)  # tiles that have a group
    total = visit_ends[-1] + num_tiles - num_used
    visit = jnp.arange(num_tiles + min(groups, rows), dtype=jnp.int32)
    visit = jnp.minimum(visit, total - 1)
    # A visit without a group keeps the matrix of the last one that had.
    last_group = jnp.max(jnp.where(count > 0, jnp.arange(groups, dtype=jnp.int32), 0))
    group = jnp.searchsorted(visit_ends, visit, side="right", method="compare_all")
    group = jnp.minimum(group.astype(jnp.int32), last_group)
    tile = first[group] + visit - (visit_ends - count)[group]
    tile = jnp.where(visit < visit_ends[-1], tile, num_used + visit - visit_ends[-1])
    return group, tile, bounds, jnp.stack([visit_ends[-1], total])


def _block_rows(rows: int, groups: int) -> int:
    """Returns the rows of a tile that make visits cheapest, all together.

    A visit takes a + b * tile bundles (a / b is 40 on v5e, 130 on v6e), and there are about
    rows / tile + groups: least at the root of the rows of a group times a / b.
    """
    best = 8 * (rows / groups) ** 0.5
    return max(_LEAST_ROWS, min(_MOST_ROWS, 1 << math.ceil(math.log2(best))))


def _block_out(out_size: int, row_bytes: int) -> int:
    """Returns how much of a matrix is in VMEM at a time: all its columns, and so many rows."""
    if out_size % LANES or out_size * row_bytes <= _MATRIX_BYTES:
        return out_size
    blocks = out_size // LANES
    fitting = max(1, _MATRIX_BYTES // (LANES * row_bytes))
    return LANES * max(size for size in range(1, fitting + 1) if blocks % size == 0)


def _check_vmem(
    lhs_dtype: jnp.dtype,
    rhs_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
    *,
    block_rows: int,
    block_out: int,
    in_size: int,
    target: TpuTarget,
) -> None:
    copies = block_rows * in_size * lhs_dtype.itemsize + block_out * in_size * rhs_dtype.itemsize
    copies += block_rows * block_out * out_dtype.itemsize
    widened = block_out * in_size * lhs_dtype.itemsize if lhs_dtype != rhs_dtype else 0
    taken = 2 * copies + widened + 2 * block_rows * block_out * 4  # two of each: one on its way
    if taken > target.vmem_bytes:
        raise ValueError(
            f"a tile of {block_rows} rows and {block_out} columns of {in_size} takes {taken} bytes "
            f"of VMEM; there are {target.vmem_bytes}"
        )


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    # What scaled matrices are multiplied as.
    return jnp.dtype(jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
