"""What the GPU kernels do with one tile of queries and one block of keys, inside a kernel.

Everything here is called with Refs and traced values of a Mosaic GPU kernel. A warpgroup holds 64
rows of queries, the least that Hopper's matrix instruction takes. Matrix products are `jnp.dot`
under interpretation, which knows no tensor cores; all else is the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention.gpu_compat import transposed

ROWS = 64  # of queries in a tile: M of wgmma
MASKED = -1e30  # finite: the difference of two is 0, not NaN
LOG2E = math.log2(math.e)


class Softmax(NamedTuple):
    """The running state of a softmax over blocks of keys (https://arxiv.org/abs/1805.02867)."""

    peak: jax.Array  # [ROWS] f32, largest logit so far, times log2(e)
    total: jax.Array  # [ROWS] f32, sum of exp2(logit - peak)
    value: jax.Array  # [ROWS, head_dim] f32, the same sum weighted by values


def swizzle_of(head_dim: int, dtype: Any) -> int:
    """Returns the bytes over which a row of a tile is swizzled: the most that divide it."""
    row_bytes = head_dim * jnp.dtype(dtype).itemsize
    return next(size for size in (128, 64, 32) if row_bytes % size == 0)


def tile(rows: int, head_dim: int, dtype: Any, *, copies: int) -> Any:
    """Returns `[copies, rows, head_dim]` of shared memory, swizzled as matrix operands must be."""
    swizzle = swizzle_of(head_dim, dtype)
    transforms = (
        plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM((copies, rows, head_dim), dtype, transforms=transforms)


def spread(value: jax.Array, interpret: bool) -> jax.Array:  # [ROWS] or [ROWS, columns]
    """Returns the value laid over the warpgroup's registers as wgmma leaves its results."""
    if interpret:
        return value
    layout = plgpu.Layout.WGMMA
    return plgpu.layout_cast(value, layout if value.ndim == 2 else layout.reduce(1))


def count(shape: tuple[int, int], axis: int, interpret: bool) -> jax.Array:
    """Returns the index along an axis, laid out as `spread` does."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def start(peak: jax.Array, total: jax.Array, head_dim: int, interpret: bool) -> Softmax:
    """Returns the softmax before any key."""
    value = jnp.zeros((ROWS, head_dim), jnp.float32)
    return Softmax(*(spread(part, interpret) for part in (peak, total, value)))


def across(column: jax.Array, width: int) -> jax.Array:  # [ROWS] -> [ROWS, width]
    """Returns one number a row, repeated over the row."""
    return lax.broadcast_in_dim(column, (column.shape[0], width), (0,))


def logits_of(
    q_tile,  # [ROWS, head_dim]
    k_tile,  # [block_kv, head_dim]
    factor: jax.Array,  # [] f32, makes a product of stored numbers a logit
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:  # [ROWS, block_kv] f32, times log2(e)
    """Returns the capped logits of a block, in the base that `exp2` wants."""
    if interpret:
        product = jnp.dot(q_tile[...], k_tile[...].T, preferred_element_type=jnp.float32)
    else:

        def multiply(accumulator):
            plgpu.wgmma(accumulator, q_tile, transposed(k_tile))
            return accumulator[...]

        shape = (q_tile.shape[0], k_tile.shape[0])
        product = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
    if soft_cap is None:
        return product * (factor * LOG2E)
    return jnp.tanh(product * (factor / soft_cap)) * (soft_cap * LOG2E)


def weigh(
    state: Softmax,
    logits: jax.Array,  # [ROWS, block_kv] f32, times log2(e)
) -> tuple[Softmax, jax.Array]:
    """Returns the state rescaled for a block of keys (their values still to add), and weights.

    A row that has seen no key yet gets weights of 1, which the first key it sees rescales to 0.
    """
    peak = jnp.maximum(state.peak, logits.max(axis=1))
    kept = jnp.exp2(state.peak - peak)
    weight = jnp.exp2(logits - across(peak, logits.shape[1]))
    total = state.total * kept + weight.sum(axis=1)
    value = state.value * across(kept, state.value.shape[1])
    return Softmax(peak, total, value), weight


def add_values(
    state: Softmax,
    weight: jax.Array,  # [ROWS, block_kv]
    v_tile,  # [block_kv, head_dim]
    interpret: bool,
) -> Softmax:
    """Returns the state with the block's weighted values."""
    if interpret:
        product = jnp.dot(weight, v_tile[...], preferred_element_type=jnp.float32)
        return state._replace(value=state.value + product)

    def multiply(accumulator):
        plgpu.wgmma(accumulator, weight, v_tile)

    return state._replace(value=pl.run_state(multiply)(plgpu.ACC.init(state.value)))


def finish(state: Softmax) -> jax.Array:  # [ROWS, head_dim] f32
    """Returns the weighted mean of the values; zeros for a row that saw no key."""
    share = 1.0 / jnp.maximum(state.total, 1e-30)
    return state.value * across(share, state.value.shape[1])


def clear_unseen(
    v_tile,  # [rows, head_dim]
    position: jax.Array,  # [] i32, of the tile's first row
    seen_from: jax.Array,  # [] i32
    seen_to: jax.Array,  # [] i32
    interpret: bool,
) -> None:
    """Zeroes the values of positions outside `[seen_from, seen_to)`.

    A row that was never written may hold anything, NaN included, and 0 * NaN is NaN.
    """
    rows, head_dim = v_tile.shape
    # A few columns at once: the registers are full of the accumulator.
    width = swizzle_of(head_dim, v_tile.dtype) // v_tile.dtype.itemsize
    for first in range(0, rows, ROWS):
        row = count((ROWS, width), 0, interpret) + (position + first)
        is_seen = (row >= seen_from) & (row < seen_to)
        for column in range(0, head_dim, width):
            part = v_tile.at[pl.ds(first, ROWS), pl.ds(column, width)]
            values = spread(part[...], interpret)
            part[...] = jnp.where(is_seen, values, jnp.zeros_like(values))
    plgpu.commit_smem()


class Context(NamedTuple):
    """The keys that a tile's queries see, in one sequence and one kv head."""

    sequence: jax.Array  # [] i32, row of the page table
    kv_head: jax.Array  # [] i32
    first: jax.Array  # [] i32, first position that any query sees
    length: jax.Array  # [] i32, positions that hold a key


class Ring(NamedTuple):
    """Blocks of keys or values in shared memory, one being read while others arrive."""

    tiles: Any  # [stages, block_kv, head_dim]
    full: Any  # [stages] barriers: the copies of a block have arrived
    free: Any  # [stages] barriers: a block has been read, and another will follow


def ring_types(
    head_dim: int, dtype: Any, pages: jax.Array, blocks: Any, *, readers: int
) -> dict[str, Any]:
    """Returns the scratch of two rings; `readers` warpgroups free a block."""
    copies = max(1, blocks.block_kv // pages.shape[1])
    types = {"v_raw": plgpu.Barrier(num_arrivals=copies)}
    for side in ("k", "v"):
        types |= {
            f"{side}_tiles": tile(blocks.block_kv, head_dim, dtype, copies=blocks.stages),
            f"{side}_full": plgpu.Barrier(num_arrivals=copies, num_barriers=blocks.stages),
            f"{side}_free": plgpu.Barrier(num_arrivals=readers, num_barriers=blocks.stages),
        }
    return types


def visit(
    block: jax.Array,  # [] i32
    begin: jax.Array,  # [] i32
    end: jax.Array,  # [] i32
    state: Softmax,
    q_tile,  # [ROWS, head_dim]
    k_ring: Ring,
    v_ring: Ring,
    factor: jax.Array,  # [] f32, makes a product of stored numbers a logit
    soft_cap: float | None,
    mask: Callable[[jax.Array, jax.Array], jax.Array] | None,
    interpret: bool,
) -> Softmax:
    """Returns the state with one of the blocks `[begin, end)`, and frees its place in the rings."""
    stages = k_ring.tiles.shape[0]
    slot = lax.rem(block - begin, jnp.int32(stages))

    def free(ring: Ring) -> None:
        # An arrival that nobody waits for would be left over when the kernel ends.
        @pl.when(block + stages < end)
        def _arrive():
            plgpu.barrier_arrive(ring.free.at[slot])

    plgpu.barrier_wait(k_ring.full.at[slot])
    logits = logits_of(q_tile, k_ring.tiles.at[slot], factor, soft_cap, interpret)
    free(k_ring)
    if mask is not None:
        logits = mask(logits, block)
    state, weight = weigh(state, logits)
    state, weight = lax.optimization_barrier((state, weight.astype(v_ring.tiles.dtype)))
    plgpu.barrier_wait(v_ring.full.at[slot])
    state = add_values(state, weight, v_ring.tiles.at[slot], interpret)
    free(v_ring)
    return state


def load_blocks(
    begin: jax.Array,  # [] i32
    end: jax.Array,  # [] i32
    context: Context,
    page_table,  # [sequences, pages_per_sequence] i32
    page_size: int,
    keys,  # [parts, part_size, kv_heads, head_dim]
    values,  # [parts, part_size, kv_heads, head_dim]
    k_ring: Ring,
    v_ring: Ring,
    v_raw,  # barrier: values have arrived that are still to be cleared
    interpret: bool,
) -> None:
    """Fills the rings with blocks `[begin, end)`; run by a warpgroup of its own.

    A row that was never written may hold anything, NaN included, and 0 * NaN is NaN: values that
    no query sees are cleared, which only the outermost blocks have.
    """
    stages, block_kv, _ = k_ring.tiles.shape

    def load(block, _):
        index = block - begin
        slot = lax.rem(index, jnp.int32(stages))
        ids = page_ids(page_table, context, block, block_kv, page_size)
        _wait_until_free(k_ring, index, slot)
        copy_parts(keys, ids, context.kv_head, k_ring.tiles.at[slot], k_ring.full.at[slot])
        _wait_until_free(v_ring, index, slot)
        first = block * block_kv
        is_edge = (first < context.first) | (first + block_kv > context.length)
        v_tile = v_ring.tiles.at[slot]

        @pl.when(jnp.logical_not(is_edge))
        def _copy():
            copy_parts(values, ids, context.kv_head, v_tile, v_ring.full.at[slot])

        @pl.when(is_edge)
        def _copy_and_clear():
            copy_parts(values, ids, context.kv_head, v_tile, v_raw)
            plgpu.barrier_wait(v_raw)
            clear_unseen(v_tile, first, context.first, context.length, interpret)
            for _ in ids:  # as many as the copies would have sent
                plgpu.barrier_arrive(v_ring.full.at[slot])

        return ()

    lax.fori_loop(begin, end, load, ())


def _wait_until_free(ring: Ring, index: jax.Array, slot: jax.Array) -> None:
    @pl.when(index >= ring.tiles.shape[0])
    def _wait():
        plgpu.barrier_wait(ring.free.at[slot])


def page_ids(
    page_table,  # [sequences, pages_per_sequence] i32
    context: Context,
    block: jax.Array,  # [] i32
    block_kv: int,
    page_size: int,
) -> list[jax.Array]:
    """Returns where the parts of a block of keys are, in `parts_of_pages`."""
    # The last block may reach past the pages that the sequence has.
    last = lax.div(context.length - 1, jnp.int32(page_size))
    size = min(page_size, block_kv)
    ids = []
    for part in range(block_kv // size):
        position = block * block_kv + part * size
        index = jnp.minimum(lax.div(position, jnp.int32(page_size)), last)
        page = page_table[context.sequence, index]
        if page_size > size:
            page = page * (page_size // size)
            page += lax.div(lax.rem(position, jnp.int32(page_size)), jnp.int32(size))
        ids.append(page)
    return ids


def parts_of_pages(
    pages: jax.Array,  # [pages, page_size, kv_heads, head_dim]
    block_kv: int,
) -> jax.Array:  # [parts, part_size, kv_heads, head_dim]
    """Returns the pages cut in parts that fit a block of keys: what one copy moves."""
    return pages.reshape(-1, min(pages.shape[1], block_kv), *pages.shape[2:])


def copy_parts(
    pages,  # [parts, part_size, kv_heads, head_dim]
    ids: list[jax.Array],
    kv_head: jax.Array,
    rows,  # [block_kv, head_dim], shared memory
    barrier,
) -> None:
    """Starts the copies of a block of keys or values; each arrives at the barrier."""
    size = pages.shape[1]
    for index, part in enumerate(ids):
        target = rows.at[pl.ds(index * size, size)]
        plgpu.copy_gmem_to_smem(pages.at[part, :, kv_head], target, barrier)
