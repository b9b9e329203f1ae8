"""The TPU kernel for sequences of one token: writes the token's key and value, and attends.

A grid step takes a few sequences and visits their keys block by block. While a block is computed
the next is copied in, be it of the same sequence, the next one or the next grid step's.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_blocks import DecodeBlocks
from pallas_kernels.ragged_paged_attention.tpu_pages import (
    Pages,
    Rules,
    Softmax,
    clear_unseen,
    finish,
    load_sides,
    select,
    span_of,
    start_fetch,
    start_softmax,
    visit,
    wait_fetch,
)


@dataclass(frozen=True)
class _Step:
    """A grid step: the kernel's operands, in order, and what it does with them."""

    # scalars
    num_one: Any  # [1] i32, sequences of one token
    kv_lens: Any  # [sequences + 1] i32
    # inputs
    table: Any  # [rows + 1, pages_per_sequence] i32 in SMEM; its last row is the next step's first
    factors: Any  # [2] f32 in SMEM
    sinks: Any  # [kv_heads, group, 128] f32
    q: Any  # [rows, kv_heads, group, lanes]
    new: Any  # [rows, kv_heads, sides, lanes]
    cache_before: Any  # the same memory as `cache`
    # outputs
    out: Any  # [rows, kv_heads, group, lanes]
    cache: Any  # [pages, kv_heads, sides, page_size, lanes] in HBM
    # scratch
    blocks: Any  # [2, per_block, kv_heads, sides, page_size, lanes]
    tiles: Any  # [2, kv_heads, sides, granule, lanes], on their way to the cache
    fetched: Any  # [2] DMA semaphores, of `blocks`
    written: Any  # [2] DMA semaphores, of `tiles`
    slot: Any  # [1] i32 in SMEM, which of the two blocks is next
    _: KW_ONLY
    pages: Pages
    rules: Rules

    def run(self) -> None:
        """Attends from this step's sequences."""
        step, rows, num_one = pl.program_id(0), self.q.shape[0], self.num_one[0]
        num_rows = jnp.clip(num_one - step * rows, 0, rows)

        @pl.when((step == 0) & (num_one > 0))
        def _() -> None:
            self.slot[0] = 0
            self.fetch(0, self.first_block(0), 0)

        @pl.when(num_rows < rows)
        def _() -> None:
            self.out[...] = jnp.zeros_like(self.out)

        self.slot[0] = lax.fori_loop(0, num_rows, self.visit_sequence, self.slot[0])

        @pl.when((num_rows > 0) & (step * rows + num_rows == num_one))
        def _() -> None:
            self.wait_written(lax.rem(num_one - 1, 2))

            @pl.when(num_one > 1)
            def _() -> None:
                self.wait_written(lax.rem(num_one, 2))

    def index_of(self, row: jax.Array) -> jax.Array:
        """Returns which sequence of the batch has a row of this step."""
        return pl.program_id(0) * self.q.shape[0] + row

    def context_of(self, row: Any) -> tuple[Any, jax.Array]:
        """Returns [start, stop) of the positions that the row's token sees."""
        stop = jnp.maximum(self.kv_lens[self.index_of(row)], 1)
        window = self.rules.sliding_window
        return (0 if window is None else jnp.maximum(stop - window, 0)), stop

    def first_block(self, row: Any) -> Any:
        """Returns the first block that the row's token sees."""
        return lax.div(self.context_of(row)[0], self.pages.block_kv)

    def fetch(self, row: Any, block: Any, slot: Any) -> None:
        """Starts to copy a block in."""
        span = span_of(block, *self.context_of(row), self.pages)
        start_fetch(
            self.cache,
            self.blocks.at[slot],
            self.fetched.at[slot],
            lambda page: self.table[row, block * self.pages.per_block + page],
            span,
        )

    def visit_sequence(self, row: jax.Array, slot: jax.Array) -> jax.Array:
        """Attends from one row. Returns the slot of the next row's first block."""
        _, stop = self.context_of(row)
        state = start_softmax(self.sinks[...], self.pages.lanes)

        def body(block: jax.Array, carry: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
            slot, state = carry
            return 1 - slot, self.visit_block(row, block, slot, state)

        end = lax.div(stop - 1, self.pages.block_kv) + 1
        slot, state = lax.fori_loop(self.first_block(row), end, body, (slot, state))
        self.out[row] = finish(state, self.factors[1]).astype(self.out.dtype)
        return slot

    def visit_block(
        self, row: jax.Array, block: jax.Array, slot: jax.Array, state: Softmax
    ) -> Softmax:
        """Returns the state after a block, while the next one is copied in."""
        start, stop = self.context_of(row)
        is_last = block == lax.div(stop - 1, self.pages.block_kv)
        next_row = jnp.where(is_last, row + 1, row)

        @pl.when(self.index_of(next_row) < self.num_one[0])
        def _() -> None:
            next_block = jnp.where(is_last, self.first_block(next_row), block + 1)
            self.fetch(next_row, next_block, 1 - slot)

        span = span_of(block, start, stop, self.pages)
        here = self.blocks.at[slot]
        wait_fetch(self.cache, here, self.fetched.at[slot], span)

        @pl.when(is_last)
        def _() -> None:
            self.write(row, block, here, stop - 1)

        @pl.when((span.start > 0) | (span.stop < self.pages.block_kv))
        def _() -> None:
            clear_unseen(here, span, self.pages)

        shape = (self.pages.kv_heads, self.q.shape[2], self.pages.block_kv)
        position = lax.broadcasted_iota(jnp.int32, shape, 2)
        is_seen = (position >= span.start) & (position < span.stop)
        keys, values = load_sides(here, range(self.pages.kv_heads), self.pages)
        q = self.q[row]
        return visit(state, q, keys, values, is_seen, self.factors[0], self.rules.soft_cap)

    def write(self, row: jax.Array, block: jax.Array, here: Any, position: jax.Array) -> None:
        """Puts the new key and value into the block, and starts to copy their rows home."""
        pages, parity = self.pages, lax.rem(self.index_of(row), 2)
        page, offset = lax.div(position, pages.page_size), lax.rem(position, pages.page_size)
        first = pl.multiple_of(offset // pages.granule * pages.granule, pages.granule)
        at_page = here.at[page - block * pages.per_block, :, :, pl.ds(first, pages.granule)]
        shape = (pages.kv_heads, pages.sides, pages.granule, pages.lanes)
        is_new = lax.broadcasted_iota(jnp.int32, shape, 2) == offset - first
        new = jnp.broadcast_to(self.new[row][:, :, None, :], shape)
        tile = select(is_new, new, at_page[...])
        at_page[...] = tile

        @pl.when(self.index_of(row) >= 2)
        def _() -> None:
            self.wait_written(parity)

        self.tiles[parity] = tile
        home = self.cache.at[self.table[row, page], :, :, pl.ds(first, pages.granule)]
        pltpu.make_async_copy(self.tiles.at[parity], home, self.written.at[parity]).start()

    def wait_written(self, parity: jax.Array) -> None:
        """Waits until a tile is in the cache."""
        home = self.cache.at[0, :, :, pl.ds(0, self.pages.granule)]
        pltpu.make_async_copy(self.tiles.at[parity], home, self.written.at[parity]).wait()


def _kernel(*refs, pages, rules):
    _Step(*refs, pages=pages, rules=rules).run()


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
    rules: Rules,
    blocks: DecodeBlocks,
    dtype: jnp.dtype,  # of the result
    vmem_limit_bytes: int,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `[sequences, kv_heads, group, lanes]`, zeros from row `num_one` on, and the cache."""
    sequences, kv_heads, group, lanes = q.shape
    pages, rows = blocks.pages, blocks.rows
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
            jax.ShapeDtypeStruct(q.shape, dtype),
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
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="attend_one",
    )(num_one.reshape(1), kv_lens, table, factors, sinks, q, new, cache)
    return out, cache
