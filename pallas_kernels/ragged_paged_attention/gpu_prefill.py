"""Attention from several tokens of a sequence on an NVIDIA GPU: tiles of queries, one pass of keys.

A program takes a tile: 64 rows for each of its computing warpgroups, a row being one query head of
one token. It walks the keys that the tile sees; blocks that every row sees whole take a loop
without masks. One more warpgroup starts the copies of pages into a ring of shared memory
(https://arxiv.org/abs/2407.08608).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import gpu_tiles as tiles
from pallas_kernels.ragged_paged_attention.gpu_blocks import ROWS, PrefillBlocks
from pallas_kernels.ragged_paged_attention.gpu_compat import compiler_params, interpreter
from pallas_kernels.ragged_paged_attention.gpu_softmax import LOG2E, MASKED, finish, sink_total
from pallas_kernels.ragged_paged_attention.gpu_work import prefill_items, walk_of

# Two warpgroups that compute and one that loads share the 65,536 registers of an SM.
COMPUTE_REGISTERS, LOADER_REGISTERS = 224, 56


def attend_prefill(
    q: jax.Array,  # [tokens, groups, group_size, head_dim]
    cache: tuple[jax.Array, ...],  # keys, values [pages, page_size, kv_heads, head_dim]
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
    factor: jax.Array,  # [1] f32, makes a product of stored numbers a logit
    sinks: jax.Array,  # [groups, group_size] f32
    *,
    blocks: PrefillBlocks,
    sliding_window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:  # [tokens, groups, group_size, head_dim]
    """Returns attention from the sequences of several tokens; the rows of others are garbage."""
    tokens, groups, group_size, head_dim = q.shape
    tile_tokens = blocks.warpgroups * (ROWS // group_size)
    items = prefill_items(kv_lens, cu_q_lens, counts, tokens, tile_tokens)
    rows = q.transpose(1, 0, 2, 3).reshape(groups, tokens * group_size, head_dim)
    # A tile's copy may run past the last token.
    rows = jnp.pad(rows, ((0, 0), (0, blocks.warpgroups * ROWS), (0, 0)))
    sinks = jnp.tile(sinks, (1, -(-ROWS // group_size)))[:, :ROWS]
    page_size = cache[0].shape[1]
    shape = (blocks.warpgroups, ROWS, head_dim)
    kernel = plgpu.kernel(
        partial(
            _tile_kernel,
            group_size=group_size,
            page_size=page_size,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct((groups, items.shape[0], *shape), q.dtype),
        scratch_types={
            "q_tiles": tiles.tile(ROWS, head_dim, q.dtype, copies=blocks.warpgroups),
            "staging": plgpu.SMEM(shape, q.dtype),
            "sink_tile": plgpu.SMEM((blocks.warpgroups, ROWS), jnp.float32),
            "q_full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.warpgroups),
            **tiles.ring_types(
                head_dim,
                q.dtype,
                cache[0],
                blocks.block_kv,
                blocks.stages,
                readers=blocks.warpgroups,
            ),
        },
        grid=(items.shape[0], groups),
        grid_names=("item", "group"),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter() if interpret else None,
        kernel_name="paged_attention_prefill",
    )
    parts = (tiles.parts_of_pages(side, blocks.block_kv) for side in cache)
    out = kernel(items, kv_lens, page_table, factor, sinks, rows, *parts)
    return _gather(out, items, tokens, group_size)


def _gather(
    tiled: jax.Array,  # [groups, items, warpgroups, ROWS, head_dim]
    items: jax.Array,  # [items, 4] i32
    tokens: int,
    group_size: int,
) -> jax.Array:  # [tokens, groups, group_size, head_dim]
    """Returns each token's rows. Programs write whole tiles: parts of one would be many stores."""
    groups, _, warpgroups, _, head_dim = tiled.shape
    tile_tokens = ROWS // group_size  # of a warpgroup
    tiled = tiled[:, :, :, : tile_tokens * group_size]
    tiled = tiled.reshape(groups, -1, group_size, head_dim)
    token = jnp.arange(tokens, dtype=jnp.int32)
    first, count = items[None, :, 1], items[None, :, 2]
    is_own = (token[:, None] >= first) & (token[:, None] < first + count)
    item = jnp.argmax(is_own, axis=1).astype(jnp.int32)
    index = item * (warpgroups * tile_tokens) + token - items[item, 1]
    return jnp.take(tiled, index, axis=1, mode="clip").transpose(1, 0, 2, 3)


def _tile_kernel(
    # inputs
    items,  # [items, 4] i32
    kv_lens,  # [sequences] i32
    page_table,  # [sequences, pages_per_sequence] i32
    factor,  # [1] f32
    sinks,  # [groups, ROWS] f32, of a tile's rows
    q,  # [groups, tokens * group_size + padding, head_dim]
    keys,  # [parts, part_size, kv_heads, head_dim]
    values,  # [parts, part_size, kv_heads, head_dim]
    # output
    out,  # [groups, items, warpgroups, ROWS, head_dim]
    # scratch
    q_tiles,  # [warpgroups, ROWS, head_dim], outputs in the end
    staging,  # [warpgroups, ROWS, head_dim]
    sink_tile,  # [warpgroups, ROWS] f32
    q_full,
    key_ring: tiles.Ring,
    value_ring: tiles.Ring,
    *,
    group_size: int,
    page_size: int,
    sliding_window: int | None,
    soft_cap: float | None,
    interpret: bool,
):
    group, warpgroup = lax.axis_index("group"), lax.axis_index("warpgroup")
    item = lax.axis_index("item")
    sequence, row, num_tokens, position = (items[item, column] for column in range(4))
    warpgroups, _, head_dim = q_tiles.shape
    block_kv = key_ring.tiles.shape[1]
    tokens = ROWS // group_size  # of a warpgroup

    walk = walk_of(position, num_tokens, sliding_window, block_kv)
    kv_head = lax.div(group, jnp.int32(q.shape[0] // keys.shape[2]))
    context = tiles.Context(sequence, kv_head, walk.first, kv_lens[sequence])
    stream = tiles.Stream(key_ring, value_ring, walk.begin, walk.end)

    @pl.when((num_tokens > 0) & (warpgroup == warpgroups))
    def _load():
        if warpgroups > 1:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        pages = tiles.Pages(page_table, page_size, keys, values)
        tiles.load_blocks(stream, pages, context, interpret)

    @pl.when((num_tokens > 0) & (warpgroup < warpgroups))
    def _compute():
        if warpgroups > 1:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        own_row, q_tile = row + warpgroup * tokens, q_tiles.at[warpgroup]
        full = q_full.at[warpgroup]
        # Rows that begin anywhere do not fit a swizzled tile.
        q_rows = q.at[group, pl.ds(own_row * group_size, ROWS)]
        plgpu.copy_gmem_to_smem(q_rows, staging.at[warpgroup], full)
        plgpu.copy_gmem_to_smem(sinks.at[group], sink_tile.at[warpgroup], full)
        plgpu.barrier_wait(full)
        q_tile[...] = tiles.read_unswizzled(staging.at[warpgroup], interpret)
        plgpu.commit_smem()
        own_position = position + warpgroup * tokens
        logit_factor = factor[0]

        def mask(logits, block):
            # Row r has position own_position + r // group_size; products spare the division.
            row = tiles.count(logits.shape, 0, interpret)
            distance = tiles.count(logits.shape, 1, interpret) + (block * block_kv - own_position)
            is_seen = distance * group_size <= row
            if sliding_window is not None:
                is_seen &= (distance + sliding_window) * group_size > row
            return jnp.where(is_seen, logits, jnp.full_like(logits, MASKED))

        def visit(block, state, *, is_masked):
            block_mask = mask if is_masked else None
            return tiles.visit(
                block, state, stream, q_tile, logit_factor, soft_cap, block_mask, interpret
            )

        peak = tiles.spread(sink_tile[warpgroup], interpret) * LOG2E
        state = tiles.start(peak, sink_total(peak), head_dim, interpret)
        if sliding_window is not None:
            state = lax.fori_loop(walk.begin, walk.whole, partial(visit, is_masked=True), state)
        state = lax.fori_loop(walk.whole, walk.part, partial(visit, is_masked=False), state)
        state = lax.fori_loop(walk.part, walk.end, partial(visit, is_masked=True), state)
        q_tile[...] = finish(state).astype(q_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, out.at[group, item, warpgroup])
        plgpu.wait_smem_to_gmem(0)
