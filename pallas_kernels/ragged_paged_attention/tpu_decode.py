"""The TPU kernel for sequences of one token: writes the token's key and value, and attends.

A grid step takes a few sequences and visits their keys block by block. While a block is computed
the next is copied in, be it of the same sequence, the next one or the next grid step's.
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
    clear_unseen,
    finish,
    select,
    span_of,
    start_fetch,
    start_softmax,
    visit,
    wait_fetch,
)


def _kernel(
    # scalars
    num_one_ref,  # [1] i32, sequences of one token
    kv_lens_ref,  # [sequences + 1] i32
    # inputs
    table_ref,  # [rows + 1, pages_per_sequence] i32 in SMEM; the last row is the next step's first
    factors_ref,  # [2] f32 in SMEM
    sinks_ref,  # [kv_heads, group, 128] f32
    q_ref,  # [rows, kv_heads, group, lanes]
    new_ref,  # [rows, kv_heads, sides, lanes]
    _,  # the cache, aliased to the output
    # outputs
    out_ref,  # [rows, kv_heads, group, lanes]
    cache_ref,  # [pages, kv_heads, sides, page_size, lanes] in HBM
    # scratch
    blocks_ref,  # [2, per_block, kv_heads, sides, page_size, lanes]
    written_ref,  # [2, kv_heads, sides, granule, lanes], on its way to the cache
    fetched,  # [2] DMA semaphores
    written,  # [2] DMA semaphores
    slot_ref,  # [1] i32 in SMEM, which of the two blocks is next
    *,
    pages: Pages,
    rules: Rules,
):
    step, rows = pl.program_id(0), q_ref.shape[0]
    num_one = num_one_ref[0]
    num_rows = jnp.clip(num_one - step * rows, 0, rows)

    def context_of(row):  # [start, stop) of the positions that the row's token sees
        stop = jnp.maximum(kv_lens_ref[step * rows + row], 1)
        window = rules.sliding_window
        return (0 if window is None else jnp.maximum(stop - window, 0)), stop

    def fetch(row, block, slot):
        span = span_of(block, *context_of(row), pages)
        start_fetch(
            cache_ref,
            blocks_ref.at[slot],
            fetched.at[slot],
            lambda page: table_ref[row, block * pages.per_block + page],
            span,
        )

    def first_block(row):
        return lax.div(context_of(row)[0], pages.block_kv)

    @pl.when((step == 0) & (num_one > 0))
    def _():
        slot_ref[0] = 0
        fetch(0, first_block(0), 0)

    @pl.when(num_rows < rows)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    def visit_block(row, block, slot, state):
        start, stop = context_of(row)
        is_last = block == lax.div(stop - 1, pages.block_kv)
        next_row = jnp.where(is_last, row + 1, row)

        @pl.when(step * rows + next_row < num_one)
        def _():
            fetch(next_row, jnp.where(is_last, first_block(next_row), block + 1), 1 - slot)

        span = span_of(block, start, stop, pages)
        block_ref = blocks_ref.at[slot]
        wait_fetch(cache_ref, block_ref, fetched.at[slot], span)

        @pl.when(is_last)
        def _():
            write(row, block, block_ref, stop - 1)

        @pl.when((span.start > 0) | (span.stop < pages.block_kv))
        def _():
            clear_unseen(block_ref, span, pages)

        shape = (pages.kv_heads, q_ref.shape[2], pages.block_kv)
        position = lax.broadcasted_iota(jnp.int32, shape, 2)
        is_seen = (position >= span.start) & (position < span.stop)
        keys, values = load_sides(block_ref)
        return visit(state, q_ref[row], keys, values, is_seen, factors_ref[0], rules.soft_cap)

    def load_sides(block_ref):
        def load(side):
            return jnp.stack([
                block_ref[:, head, side].reshape(pages.block_kv, pages.lanes)
                for head in range(pages.kv_heads)
            ]).astype(pages.compute_dtype)  # fmt: skip

        keys = load(0)
        return keys, (keys if pages.is_packed else load(1))

    def write(row, block, block_ref, position):
        index = step * rows + row
        page, offset = lax.div(position, pages.page_size), lax.rem(position, pages.page_size)
        first = pl.multiple_of(offset // pages.granule * pages.granule, pages.granule)
        tile_ref = block_ref.at[page - block * pages.per_block, :, :, pl.ds(first, pages.granule)]
        shape = (pages.kv_heads, pages.sides, pages.granule, pages.lanes)
        is_new = lax.broadcasted_iota(jnp.int32, shape, 2) == offset - first
        tile = select(is_new, jnp.broadcast_to(new_ref[row][:, :, None, :], shape), tile_ref[...])
        tile_ref[...] = tile
        parity = lax.rem(index, 2)

        @pl.when(index >= 2)
        def _():
            wait_written(parity)

        written_ref[parity] = tile
        home_ref = cache_ref.at[table_ref[row, page], :, :, pl.ds(first, pages.granule)]
        pltpu.make_async_copy(written_ref.at[parity], home_ref, written.at[parity]).start()

    def wait_written(parity):
        home_ref = cache_ref.at[0, :, :, pl.ds(0, pages.granule)]
        pltpu.make_async_copy(written_ref.at[parity], home_ref, written.at[parity]).wait()

    def visit_sequence(row, slot):
        start, stop = context_of(row)
        state = start_softmax(sinks_ref[...], pages.lanes)

        def body(block, carry):
            slot, state = carry
            return 1 - slot, visit_block(row, block, slot, state)

        end = lax.div(stop - 1, pages.block_kv) + 1
        slot, state = lax.fori_loop(lax.div(start, pages.block_kv), end, body, (slot, state))
        out_ref[row] = finish(state, factors_ref[1]).astype(out_ref.dtype)
        return slot

    slot_ref[0] = lax.fori_loop(0, num_rows, visit_sequence, slot_ref[0])

    @pl.when((num_rows > 0) & (step * rows + num_rows == num_one))
    def _():
        wait_written(lax.rem(num_one - 1, 2))

        @pl.when(num_one > 1)
        def _():
            wait_written(lax.rem(num_one, 2))


def attend_one(
    q: jax.Array,  # [sequences, kv_heads, group, lanes]
    new: jax.Array,  # [sequences, kv_heads, sides, lanes], in the cache's type
    cache: jax.Array,  # [pages, kv_heads, sides, page_size, lanes]
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    num_one: jax.Array,  # [] i32
    factors: jax.Array,  # [2] f32
    sinks: jax.Array,  # [kv_heads, group, 128] f32, times LOG2_E
    *,
    pages: Pages,
    rules: Rules,
    rows: int,  # sequences to a grid step
    vmem_bytes: int,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `[sequences, kv_heads, group, lanes]`, zeros from row `num_one` on, and the cache."""
    sequences, kv_heads, group, lanes = q.shape
    steps = -(-sequences // rows)
    padding = steps * rows - sequences
    kv_lens = jnp.pad(kv_lens, (0, padding + 1))
    page_table = jnp.pad(page_table, ((0, padding), (0, 0))).reshape(steps, rows, -1)
    table = jnp.concatenate([page_table, jnp.roll(page_table[:, :1], -1, axis=0)], axis=1)

    def of_rows(shape):
        return pl.BlockSpec((rows, *shape), lambda step, *_: (step,) + (0,) * len(shape))

    out, cache = pl.pallas_call(
        functools.partial(_kernel, pages=pages, rules=rules),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps,),
            in_specs=[
                pl.BlockSpec(
                    (None, *table.shape[1:]), lambda step, *_: (step, 0, 0), memory_space=pltpu.SMEM
                ),
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec(sinks.shape, lambda step, *_: (0, 0, 0)),
                of_rows(q.shape[1:]),
                of_rows(new.shape[1:]),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[of_rows(q.shape[1:]), pl.BlockSpec(memory_space=pl.ANY)],
            scratch_shapes=[
                pltpu.VMEM((2, pages.per_block, *pages.shape), cache.dtype),
                pltpu.VMEM((2, kv_heads, pages.sides, pages.granule, lanes), cache.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        input_output_aliases={7: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=vmem_bytes,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="attend_one",
    )(num_one.reshape(1), kv_lens, table, factors, sinks, q, new, cache)
    return out, cache
