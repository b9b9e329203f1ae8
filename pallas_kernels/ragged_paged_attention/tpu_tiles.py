"""The TPU kernel for sequences of several tokens: tiles of queries against blocks of keys.

A tile is a fixed range of the step's tokens, of one sequence or of several; a grid step is a tile
and one sequence that has tokens in it, and leaves the tile's other rows alone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_pages import (
    Pages,
    Rules,
    Softmax,
    clear_unseen,
    finish,
    span_of,
    start_fetch,
    start_softmax,
    visit,
    wait_fetch,
)


import os
HB=int(os.environ.get("HB","1"))
def _kernel(
    # scalars
    num_items_ref,  # [1] i32, pairs of a tile and a sequence
    tiles_ref,  # [items + 1] i32
    owners_ref,  # [items + 1] i32, sequence of each item
    kv_lens_ref,  # [sequences] i32
    cu_q_lens_ref,  # [sequences + 1] i32
    # inputs
    table_ref,  # [1, pages_per_sequence] i32 in SMEM, of this item's sequence
    next_table_ref,  # [1, pages_per_sequence] i32 in SMEM, of the next item's
    factors_ref,  # [2] f32 in SMEM
    sinks_ref,  # [kv_heads, rows, 128] f32
    q_ref,  # [kv_heads, rows, lanes], rows are [group, block_q]
    cache_ref,  # [pages, kv_heads, sides, page_size, lanes] in HBM
    # outputs
    out_ref,  # [kv_heads, rows, lanes]
    # scratch
    blocks_ref,  # [2, per_block, kv_heads, sides, page_size, lanes]
    fetched,  # [2] DMA semaphores
    slot_ref,  # [1] i32 in SMEM, which of the two blocks is next
    peak_ref,  # [kv_heads, rows, 128] f32, lanes alike
    total_ref,  # [kv_heads, rows, 128] f32
    value_ref,  # [kv_heads, rows, lanes] f32
    *,
    pages: Pages,
    rules: Rules,
    block_q: int,
):
    item = pl.program_id(0)
    num_items = num_items_ref[0]
    kv_heads, rows, _ = q_ref.shape

    def queries_of(item):  # [start, stop) of the item's tokens, and the position of token 0
        owner, first = owners_ref[item], tiles_ref[item] * block_q
        start, stop = cu_q_lens_ref[owner], cu_q_lens_ref[owner + 1]
        offset = kv_lens_ref[owner] - stop
        return jnp.maximum(start, first), jnp.minimum(stop, first + block_q), offset

    def context_of(item):  # [start, stop) of the positions that the item's tokens see
        first, end, offset = queries_of(item)
        window = rules.sliding_window
        return (0 if window is None else jnp.maximum(first + offset + 1 - window, 0)), end + offset

    def fetch(item, table_ref, block, slot):
        span = span_of(block, *context_of(item), pages)
        start_fetch(
            cache_ref,
            blocks_ref.at[slot],
            fetched.at[slot],
            lambda page: table_ref[0, block * pages.per_block + page],
            span,
        )

    def first_block(item):
        return lax.div(context_of(item)[0], pages.block_kv)

    @pl.when((item == 0) & (num_items > 0))
    def _():
        slot_ref[0] = 0
        fetch(0, table_ref, first_block(0), 0)

    @pl.when((item == 0) | (tiles_ref[item] != tiles_ref[jnp.maximum(item - 1, 0)]))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    def visit_block(block, slot):
        start, stop = context_of(item)
        is_last = block == lax.div(stop - 1, pages.block_kv)

        @pl.when(jnp.logical_not(is_last))
        def _():
            fetch(item, table_ref, block + 1, 1 - slot)

        @pl.when(is_last & (item + 1 < num_items))
        def _():
            fetch(item + 1, next_table_ref, first_block(item + 1), 1 - slot)

        span = span_of(block, start, stop, pages)
        block_ref = blocks_ref.at[slot]
        wait_fetch(cache_ref, block_ref, fetched.at[slot], span)

        @pl.when((span.start > 0) | (span.stop < pages.block_kv))
        def _():
            clear_unseen(block_ref, span, pages)

        # Position of the query less that of the key, both counted from the block's first key.
        offset = tiles_ref[item] * block_q + queries_of(item)[2] - block * pages.block_kv
        shape = (1, rows, pages.block_kv)
        query = lax.broadcasted_iota(jnp.int32, shape, 1) & (block_q - 1)
        distance = query - lax.broadcasted_iota(jnp.int32, shape, 2)
        is_seen = distance >= -offset
        if rules.sliding_window is not None:
            is_seen &= distance < rules.sliding_window - offset

        def visit_head(head, _):
            def load(side):
                return jnp.stack([
                    block_ref[:, head * HB + h, side].reshape(pages.block_kv, pages.lanes) for h in range(HB)]).astype(pages.compute_dtype)

            keys = load(0)
            values = keys if pages.is_packed else load(1)
            of_head = pl.ds(head*HB, HB)
            state = Softmax(peak_ref[of_head], total_ref[of_head], value_ref[of_head])
            state = visit(
                state, q_ref[of_head], keys, values, is_seen, factors_ref[0], rules.soft_cap
            )
            peak_ref[of_head], total_ref[of_head], value_ref[of_head] = state

        lax.fori_loop(0, kv_heads//HB, visit_head, None)
        return 1 - slot

    @pl.when(item < num_items)
    def _():
        def start(head, _):
            state = start_softmax(sinks_ref[head], pages.lanes)
            peak_ref[head], total_ref[head], value_ref[head] = state

        lax.fori_loop(0, kv_heads, start, None)
        start, stop = context_of(item)
        end = lax.div(stop - 1, pages.block_kv) + 1
        slot_ref[0] = lax.fori_loop(first_block(item), end, visit_block, slot_ref[0])

        first, end, _ = queries_of(item)
        token = lax.broadcasted_iota(jnp.int32, (rows, out_ref.shape[2]), 0) & (block_q - 1)
        token = tiles_ref[item] * block_q + token
        is_own = (token >= first) & (token < end)

        def put(head, _):
            state = Softmax(peak_ref[head], total_ref[head], value_ref[head])
            out = finish(state, factors_ref[1]).astype(out_ref.dtype)
            out_ref[head] = jnp.where(is_own, out, out_ref[head])

        lax.fori_loop(0, kv_heads, put, None)


def attend_tiles(
    q: jax.Array,  # [tokens, kv_heads, group, lanes]
    cache: jax.Array,  # [pages, kv_heads, sides, page_size, lanes], with this step's rows
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
    factors: jax.Array,  # [2] f32
    sinks: jax.Array,  # [kv_heads, group, 128] f32, times LOG2_E
    *,
    pages: Pages,
    rules: Rules,
    block_q: int,  # tokens of a tile, a power of two
    vmem_bytes: int,
    interpret: Any = False,
) -> jax.Array:  # [tokens, kv_heads, group, lanes]
    """Returns the attention of sequences `counts[0]` to `counts[1]`; other rows are garbage."""
    tokens, kv_heads, group, lanes = q.shape
    num_tiles = -(-tokens // block_q)
    num_items, tiles, owners = _items(cu_q_lens, counts, num_tiles, block_q)
    q = jnp.pad(q, ((0, num_tiles * block_q - tokens), (0, 0), (0, 0), (0, 0)))
    q = q.reshape(num_tiles, block_q, kv_heads, group, lanes).transpose(0, 2, 3, 1, 4)
    q = q.reshape(num_tiles, kv_heads, group * block_q, lanes)
    sinks = jnp.repeat(sinks, block_q, axis=1)
    rows = group * block_q

    of_tile = pl.BlockSpec(
        (None, kv_heads, rows, lanes), lambda item, _, tiles, *rest: (tiles[item], 0, 0, 0)
    )

    def of_owner(distance):
        return pl.BlockSpec(
            (None, 1, page_table.shape[1]),
            lambda item, _, tiles, owners, *rest: (owners[item + distance], 0, 0),
            memory_space=pltpu.SMEM,
        )

    table = page_table[:, None, :]
    out = pl.pallas_call(
        functools.partial(_kernel, pages=pages, rules=rules, block_q=block_q),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(jnp.maximum(num_items, 1),),
            in_specs=[
                of_owner(0),
                of_owner(1),
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec(sinks.shape, lambda *_: (0, 0, 0)),
                of_tile,
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=of_tile,
            scratch_shapes=[
                pltpu.VMEM((2, pages.per_block, *pages.shape), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.VMEM((kv_heads, rows, 128), jnp.float32),
                pltpu.VMEM((kv_heads, rows, 128), jnp.float32),
                pltpu.VMEM((kv_heads, rows, lanes), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_bytes,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="attend_tiles",
    )(num_items.reshape(1), tiles, owners, kv_lens, cu_q_lens, table, table, factors, sinks, q, cache)
    out = out.reshape(num_tiles, kv_heads, group, block_q, lanes).transpose(0, 3, 1, 2, 4)
    return out.reshape(-1, kv_heads, group, lanes)[:tokens]


def _items(
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
    num_tiles: int,
    block_q: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns how many pairs of a tile and a sequence there are, and both of each, in order."""
    sequences = cu_q_lens.shape[0] - 1
    sequence = jnp.arange(sequences, dtype=jnp.int32)
    is_long = (sequence >= counts[0]) & (sequence < counts[1])
    first_tile = cu_q_lens[:-1] // block_q
    count = jnp.where(is_long, (cu_q_lens[1:] - 1) // block_q + 1 - first_tile, 0)
    ends = jnp.cumsum(count, dtype=jnp.int32)
    item = jnp.arange(num_tiles + sequences + 1, dtype=jnp.int32)
    owner = jnp.minimum((ends[None, :] <= item[:, None]).sum(1, dtype=jnp.int32), sequences - 1)
    tile = jnp.clip(first_tile[owner] + item - (ends - count)[owner], 0, num_tiles - 1)
    return ends[-1], tile, owner
