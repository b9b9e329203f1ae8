"""Attention from one token of each sequence on an NVIDIA GPU: split over keys, then merged.

The queries of one kv head are few, so a tile of 64 rows is mostly padding: reading the keys is what
takes time. One warpgroup starts the copies of pages into a ring of shared memory; another
multiplies. A context is cut in as many items as fill the device, each a program of its own, and a
second kernel merges the items of a sequence (https://arxiv.org/abs/2311.01282).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import gpu_tiles as tiles
from pallas_kernels.ragged_paged_attention.gpu_blocks import ROWS, DecodeBlocks
from pallas_kernels.ragged_paged_attention.gpu_compat import compiler_params, interpreter
from pallas_kernels.ragged_paged_attention.gpu_softmax import (
    LOG2E,
    MASKED,
    Softmax,
    finish,
    merge,
    sink_total,
)
from pallas_kernels.ragged_paged_attention.gpu_work import decode_items


def attend_decode(
    q: jax.Array,  # [sequences, groups, group_size, head_dim], one or more groups of each kv head
    cache: tuple[jax.Array, ...],  # keys, values [pages, page_size, kv_heads, head_dim]
    context: jax.Array,  # [sequences] i32, 0 for none
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    factor: jax.Array,  # [1] f32, makes a product of stored numbers a logit
    sinks: jax.Array,  # [groups, group_size] f32
    *,
    blocks: DecodeBlocks,
    sliding_window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:  # [sequences, groups, group_size, head_dim]
    """Returns attention from each sequence's newest token; zeros without a context."""
    sequences, groups, num_heads, head_dim = q.shape
    # Rows of a swizzled tile come in eights.
    pad = -num_heads % 8
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pad), (0, 0)))
    sinks = jnp.pad(sinks, ((0, 0), (0, ROWS - num_heads)), constant_values=MASKED)
    group_size = num_heads + pad
    items, first_item = decode_items(context, blocks, groups, sliding_window)
    num_items = items.shape[0]
    scratch = {
        "q_tile": tiles.tile(ROWS, head_dim, q.dtype, copies=1),
        # In halves: so that two programs fit the shared memory of an SM.
        "value_tile": tiles.tile(ROWS, head_dim // 2, jnp.float32, copies=1),
        "stats_tile": plgpu.SMEM((2, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(),
        **tiles.ring_types(head_dim, q.dtype, cache[0], blocks.block_kv, blocks.stages, readers=1),
    }
    kernel = plgpu.kernel(
        partial(
            _item_kernel,
            page_size=cache[0].shape[1],
            is_windowed=sliding_window is not None,
            soft_cap=soft_cap,
            interpret=interpret,
        ),
        out_type=(
            jax.ShapeDtypeStruct((num_items, groups, group_size, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((num_items, groups, 2, ROWS), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(num_items, groups),
        grid_names=("item", "group"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter() if interpret else None,
        kernel_name="paged_attention_decode",
    )
    parts = (tiles.parts_of_pages(side, blocks.block_kv) for side in cache)
    partials = kernel(items, context, page_table, factor, q, *parts)
    return _merge(first_item, partials, sinks, sequences, q.dtype, interpret)[:, :, :num_heads]


def _item_kernel(
    # inputs
    items,  # [items, 4] i32
    kv_lens,  # [sequences] i32
    page_table,  # [sequences, pages_per_sequence] i32
    factor,  # [1] f32
    q,  # [sequences, groups, group_size, head_dim]
    keys,  # [parts, part_size, kv_heads, head_dim]
    values,  # [parts, part_size, kv_heads, head_dim]
    # outputs
    partial_values,  # [items, groups, group_size, head_dim] f32
    partial_stats,  # [items, groups, 2, ROWS] f32, peak and total
    # scratch
    q_tile,  # [1, ROWS, head_dim]
    value_tile,  # [1, ROWS, head_dim / 2] f32
    stats_tile,  # [2, ROWS] f32
    q_full,
    key_ring: tiles.Ring,
    value_ring: tiles.Ring,
    *,
    page_size: int,
    is_windowed: bool,
    soft_cap: float | None,
    interpret: bool,
):
    item, group = lax.axis_index("item"), lax.axis_index("group")
    is_producer = lax.axis_index("warpgroup") == 1
    sequence, begin, end = items[item, 0], items[item, 1], items[item, 2]
    kv_head = lax.div(group, jnp.int32(q.shape[1] // keys.shape[2]))
    context = tiles.Context(sequence, kv_head, items[item, 3], kv_lens[sequence])
    block_kv, head_dim = key_ring.tiles.shape[1:]
    stream = tiles.Stream(key_ring, value_ring, begin, end)

    @pl.when((begin < end) & is_producer)
    def _load():
        pages = tiles.Pages(page_table, page_size, keys, values)
        tiles.load_blocks(stream, pages, context, interpret)

    @pl.when((begin < end) & jnp.logical_not(is_producer))
    def _compute():
        group_size = q.shape[2]
        plgpu.copy_gmem_to_smem(q.at[sequence, group], q_tile.at[0, pl.ds(0, group_size)], q_full)
        plgpu.barrier_wait(q_full)
        logit_factor = factor[0]

        def mask(logits, block):
            position = tiles.count(logits.shape, 1, interpret) + block * block_kv
            is_seen = position < context.length
            if is_windowed:
                is_seen &= position >= context.first
            return jnp.where(is_seen, logits, jnp.full_like(logits, MASKED))

        def visit(block, state):
            return tiles.visit(
                block, state, stream, q_tile.at[0], logit_factor, soft_cap, mask, interpret
            )

        state = tiles.start(
            jnp.full((ROWS,), MASKED, jnp.float32),
            jnp.zeros((ROWS,), jnp.float32),
            head_dim,
            interpret,
        )
        state = lax.fori_loop(begin, end, visit, state)
        stats_tile[0] = state.peak
        stats_tile[1] = state.total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stats_tile, partial_stats.at[item, group])
        width = value_tile.shape[2]
        for column in range(0, head_dim, width):
            value_tile[0] = state.value[:, column : column + width]
            plgpu.commit_smem()
            target = partial_values.at[item, group, :, pl.ds(column, width)]
            plgpu.copy_smem_to_gmem(value_tile.at[0, pl.ds(0, group_size)], target)
            plgpu.wait_smem_to_gmem(0)


def _merge(
    first_item: jax.Array,  # [sequences + 1] i32
    partials: tuple[jax.Array, jax.Array],
    sinks: jax.Array,  # [groups, ROWS] f32
    sequences: int,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:  # [sequences, groups, group_size, head_dim]
    """Returns the items of each sequence as one softmax; a sink is a key without a value."""
    _, groups, group_size, head_dim = partials[0].shape
    kernel = plgpu.kernel(
        partial(_merge_kernel, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((sequences, groups, group_size, head_dim), out_dtype),
        scratch_types={
            "value_tile": tiles.tile(ROWS, head_dim, jnp.float32, copies=1),
            "stats_tile": plgpu.SMEM((2, ROWS), jnp.float32),
            "sink_tile": plgpu.SMEM((ROWS,), jnp.float32),
            "out_tile": tiles.tile(ROWS, head_dim, out_dtype, copies=1),
            "full": plgpu.Barrier(num_arrivals=2),
            "sink_full": plgpu.Barrier(),
        },
        grid=(sequences, groups),
        grid_names=("sequence", "group"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=compiler_params(),
        interpret=interpreter() if interpret else None,
        kernel_name="paged_attention_merge",
    )
    return kernel(first_item, sinks, *partials)


def _merge_kernel(
    # inputs
    first_item,  # [sequences + 1] i32
    sinks,  # [groups, ROWS] f32
    partial_values,  # [items, groups, group_size, head_dim] f32
    partial_stats,  # [items, groups, 2, ROWS] f32
    # output
    out,  # [sequences, groups, group_size, head_dim]
    # scratch
    value_tile,  # [1, ROWS, head_dim] f32
    stats_tile,  # [2, ROWS] f32
    sink_tile,  # [ROWS] f32
    out_tile,  # [1, ROWS, head_dim]
    full,
    sink_full,
    *,
    interpret: bool,
):
    sequence, group = lax.axis_index("sequence"), lax.axis_index("group")
    group_size, head_dim = out.shape[2:]
    plgpu.copy_gmem_to_smem(sinks.at[group], sink_tile, sink_full)
    plgpu.barrier_wait(sink_full)
    peak = tiles.spread(sink_tile[...], interpret) * LOG2E

    def add(item, state):
        plgpu.copy_gmem_to_smem(
            partial_values.at[item, group], value_tile.at[0, pl.ds(0, group_size)], full
        )
        plgpu.copy_gmem_to_smem(partial_stats.at[item, group], stats_tile, full)
        plgpu.barrier_wait(full)
        part = (stats_tile[0], stats_tile[1], value_tile[0])
        state = merge(state, Softmax(*(tiles.spread(value, interpret) for value in part)))
        plgpu.commit_smem()  # what was read must have been before the next copy overwrites it
        return state

    state = tiles.start(peak, sink_total(peak), head_dim, interpret)
    state = lax.fori_loop(first_item[sequence], first_item[sequence + 1], add, state)
    out_tile[0] = finish(state).astype(out_tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_tile.at[0, pl.ds(0, group_size)], out.at[sequence, group])
    plgpu.wait_smem_to_gmem(0)
