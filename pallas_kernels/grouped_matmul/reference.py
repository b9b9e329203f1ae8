"""Grouped matrix products in XLA: a loop over tiles of rows, of which each has one group.

`jax.lax.ragged_dot` becomes dense masks on CPU and GPU, at a cost of rows times groups. Here cost
follows the real rows: only groups that have rows are visited, and only their matrices are read.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Never one row: XLA's CPU backend is many times slower with bfloat16 then. Above 64, the rows that
# fill a group's last tile cost more than larger products save.
_TILE_ROWS = (2, 64)
_BITS = {1: jnp.uint8, 2: jnp.uint16}


def grouped_matmul(
    lhs: jax.Array,  # [rows, in]
    rhs: jax.Array,  # [groups, out, in]
    group_sizes: jax.Array,  # [groups] i32
    scale: jax.Array | None,  # [groups, out] f32
    *,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:  # [rows, out]
    """Returns the products of `api.grouped_matmul`."""

    def multiply(rows: jax.Array, group: jax.Array) -> jax.Array:
        matrix = entry_of(rhs, group)
        if scale is None:
            return _dot(rows.astype(rhs.dtype), matrix)
        # Without the barrier the conversion would move into the product, element by element.
        dense = lax.optimization_barrier(matrix.astype(rows.dtype))
        return _dot(rows, dense) * entry_of(scale, group)[None]

    return multiply_by_tiles(lhs, group_sizes, rhs.shape[1], multiply).astype(out_dtype)


def multiply_by_tiles(
    lhs: jax.Array,  # [rows, in], sorted by group
    group_sizes: jax.Array,  # [groups] i32
    out_size: int,
    multiply: Callable[[jax.Array, jax.Array], jax.Array],  # [tile, in], [] i32 -> [tile, out] f32
) -> jax.Array:  # [rows, out] f32
    """Returns what `multiply` makes of each group's rows; zeros past the last group.

    With tiles of 4, groups of 5, 0 and 2 rows have 3 tiles: rows 0 to 3, 4 to 7 and 5 to 8. Each
    writes over what the one before it computed of rows that are not its group's.
    """
    rows, groups = lhs.shape[0], group_sizes.shape[0]
    tile = _tile_rows(rows, groups)
    ends = jnp.cumsum(group_sizes)
    tiles = -(-group_sizes // tile)  # of each group
    tile_ends = jnp.cumsum(tiles)
    index = jnp.arange(-(-rows // tile) + min(groups, rows), dtype=jnp.int32)
    group_of = jnp.searchsorted(tile_ends, index, side="right", method="compare_all")
    group_of = jnp.minimum(group_of, groups - 1).astype(jnp.int32)
    row_of = (ends - group_sizes)[group_of] + (index - (tile_ends - tiles)[group_of]) * tile
    padded = jnp.pad(lhs, ((0, tile), (0, 0)))

    def visit(index: jax.Array, out: jax.Array) -> jax.Array:
        row = row_of[index]
        product = multiply(lax.dynamic_slice_in_dim(padded, row, tile), group_of[index])
        return lax.dynamic_update_slice(out, product, (row, jnp.int32(0)))

    out = jnp.zeros((rows + tile, out_size), jnp.float32)
    out = lax.fori_loop(0, tile_ends[-1], visit, out)
    is_real = jnp.arange(rows, dtype=jnp.int32) < ends[-1]
    return jnp.where(is_real[:, None], out[:rows], 0.0)


def entry_of(
    stack: jax.Array,  # [groups, ...]
    group: jax.Array,  # [] i32, known only inside a loop
) -> jax.Array:  # [...]
    """Returns one group's entry, without a copy of the others.

    XLA's CPU backend slices numbers below 32 bits by converting the whole stack first, unless it
    sees bits; and takes what does not depend on the loop out of it, unless a barrier says it does.
    """
    dtype = stack.dtype
    stack, group = lax.optimization_barrier((stack, group))
    bits = None if dtype == jnp.int4 else _BITS.get(dtype.itemsize)
    if bits is None:
        return lax.dynamic_index_in_dim(stack, group, keepdims=False)
    stack = lax.bitcast_convert_type(stack, bits)
    entry = lax.optimization_barrier(lax.dynamic_index_in_dim(stack, group, keepdims=False))
    return lax.bitcast_convert_type(entry, dtype)


def _tile_rows(rows: int, groups: int) -> int:
    """Returns the rows of a tile: about as many as a group has, so that few tiles are part full."""
    mean = -(-rows // groups)
    least, most = _TILE_ROWS
    return max(least, min(most, 1 << (mean - 1).bit_length()))


def _dot(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    return lax.dot_general(
        rows, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
