"""The TPU kernel for sequences of several tokens: tiles of queries against blocks of keys.

A tile is a fixed range of the step's tokens, of one sequence or of several; a grid step is a tile
and one sequence that has tokens in it, and leaves the tile's other rows alone.
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

from pallas_kernels.ragged_paged_attention.tpu_blocks import TileBlocks
from pallas_kernels.ragged_paged_attention.tpu_pages import (
    Pages,
    Rules,
    Softmax,
    clear_unseen,
    finish,
    load_sides,
    span_of,
    start_fetch,
    start_softmax,
    visit,
    wait_fetch,
)


@dataclass(frozen=True)
class _Item:
    """A grid step, one sequence's rows of one tile: the kernel's operands, and what it does."""

    # scalars
    num_items: Any  # [1] i32
    tiles: Any  # [items + 1] i32
    owners: Any  # [items + 1] i32, sequence of each item
    kv_lens: Any  # [sequences] i32
    cu_q_lens: Any  # [sequences + 1] i32
    # inputs
    table: Any  # [1, pages_per_sequence] i32 in SMEM, of this item's sequence
    next_table: Any  # [1, pages_per_sequence] i32 in SMEM, of the next item's
    factors: Any  # [2] f32 in SMEM
    sinks: Any  # [kv_heads, group, 128] f32
    q: Any  # [kv_heads, rows, lanes], rows are [group, block_q]
    cache: Any  # [pages, kv_heads, sides, page_size, lanes] in HBM
    # outputs
    out: Any  # [kv_heads, rows, lanes]
    # scratch
    blocks: Any  # [2, per_block, kv_heads, sides, page_size, lanes]
    fetched: Any  # [2] DMA semaphores, of `blocks`
    slot: Any  # [1] i32 in SMEM, which of the two blocks is next
    peak: Any  # [kv_heads, rows, 128] f32; with the next two, a Softmax
    total: Any  # [kv_heads, rows, 128] f32
    value: Any  # [kv_heads, rows, lanes] f32
    _: KW_ONLY
    pages: Pages
    rules: Rules
    block_q: int
    heads: int  # computed together

    def run(self) -> None:
        """Attends from this item's rows, and leaves the tile's other rows alone."""
        item = pl.program_id(0)
        num_items = self.num_items[0]

        @pl.when((item == 0) & (num_items > 0))
        def _() -> None:
            self.slot[0] = 0
            self.fetch(0, self.table, self.first_block(0), 0)

        @pl.when((item == 0) | (self.tiles[item] != self.tiles[jnp.maximum(item - 1, 0)]))
        def _() -> None:
            self.out[...] = jnp.zeros_like(self.out)

        @pl.when(item < num_items)
        def _() -> None:
            self.start()
            _, stop = self.context_of(item)
            end = lax.div(stop - 1, self.pages.block_kv) + 1
            first = self.first_block(item)
            self.slot[0] = lax.fori_loop(first, end, self.visit_block, self.slot[0])
            self.finish()

    def queries_of(self, item: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns [first, end) of the item's tokens, and what their positions are more."""
        owner, first = self.owners[item], self.tiles[item] * self.block_q
        start, stop = self.cu_q_lens[owner], self.cu_q_lens[owner + 1]
        offset = self.kv_lens[owner] - stop
        return jnp.maximum(start, first), jnp.minimum(stop, first + self.block_q), offset

    def context_of(self, item: Any) -> tuple[Any, jax.Array]:
        """Returns [start, stop) of the positions that the item's tokens see."""
        first, end, offset = self.queries_of(item)
        window = self.rules.sliding_window
        start = 0 if window is None else jnp.maximum(first + offset + 1 - window, 0)
        return start, end + offset

    def first_block(self, item: Any) -> Any:
        """Returns the first block that the item's tokens see."""
        return lax.div(self.context_of(item)[0], self.pages.block_kv)

    def fetch(self, item: Any, table: Any, block: Any, slot: Any) -> None:
        """Starts to copy a block in."""
        start_fetch(
            self.cache,
            self.blocks.at[slot],
            self.fetched.at[slot],
            lambda page: table[0, block * self.pages.per_block + page],
            span_of(block, *self.context_of(item), self.pages),
        )

    def visit_block(self, block: jax.Array, slot: jax.Array) -> jax.Array:
        """Visits a block while the next one is copied in. Returns the slot of that one."""
        item = pl.program_id(0)
        start, stop = self.context_of(item)
        is_last = block == lax.div(stop - 1, self.pages.block_kv)

        @pl.when(jnp.logical_not(is_last))
        def _() -> None:
            self.fetch(item, self.table, block + 1, 1 - slot)

        @pl.when(is_last & (item + 1 < self.num_items[0]))
        def _() -> None:
            self.fetch(item + 1, self.next_table, self.first_block(item + 1), 1 - slot)

        span = span_of(block, start, stop, self.pages)
        here = self.blocks.at[slot]
        wait_fetch(self.cache, here, self.fetched.at[slot], span)

        @pl.when((span.start > 0) | (span.stop < self.pages.block_kv))
        def _() -> None:
            clear_unseen(here, span, self.pages)

        is_seen = self.is_seen(block)

        def visit_heads(index: jax.Array, _: None) -> None:
            first = index * self.heads
            some = pl.ds(first, self.heads)
            keys, values = load_sides(
                here, (first + head for head in range(self.heads)), self.pages
            )
            state = Softmax(self.peak[some], self.total[some], self.value[some])
            self.peak[some], self.total[some], self.value[some] = visit(
                state, self.q[some], keys, values, is_seen, self.factors[0], self.rules.soft_cap
            )

        lax.fori_loop(0, self.pages.kv_heads // self.heads, visit_heads, None)
        return 1 - slot

    def is_seen(self, block: jax.Array) -> jax.Array:  # [1, rows, block_kv] bool
        """Returns which keys of a block each row sees; for rows of other sequences, any."""
        item = pl.program_id(0)
        # Position of the tile's first token, counted from the block's first key.
        ahead = self.tiles[item] * self.block_q + self.queries_of(item)[2]
        ahead = ahead - block * self.pages.block_kv
        shape = (1, self.q.shape[1], self.pages.block_kv)
        distance = self.token_of(shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 2)
        is_seen = distance >= -ahead
        if self.rules.sliding_window is not None:
            is_seen &= distance < self.rules.sliding_window - ahead
        return is_seen

    def token_of(self, shape: tuple[int, ...], axis: int) -> jax.Array:  # [*shape] i32
        """Returns each row's token, counted from the tile's first."""
        return lax.broadcasted_iota(jnp.int32, shape, axis) & (self.block_q - 1)

    def start(self) -> None:
        """Makes the softmax that of no key."""

        def start(head: jax.Array, _: None) -> None:
            sinks = jnp.broadcast_to(
                self.sinks[head][:, None, :], (self.sinks.shape[1], self.block_q, 128)
            ).reshape(self.peak.shape[1:])
            state = start_softmax(sinks, self.pages.lanes)
            self.peak[head], self.total[head], self.value[head] = state

        lax.fori_loop(0, self.pages.kv_heads, start, None)

    def finish(self) -> None:
        """Puts the means into the item's own rows of the tile."""
        item = pl.program_id(0)
        first, end, _ = self.queries_of(item)
        token = self.tiles[item] * self.block_q + self.token_of(self.out.shape[1:], 0)
        is_own = (token >= first) & (token < end)

        def put(head: jax.Array, _: None) -> None:
            state = Softmax(self.peak[head], self.total[head], self.value[head])
            out = finish(state, self.factors[1]).astype(self.out.dtype)
            self.out[head] = jnp.where(is_own, out, self.out[head])

        lax.fori_loop(0, self.pages.kv_heads, put, None)


def _kernel(*refs, pages, rules, block_q, heads):
    _Item(*refs, pages=pages, rules=rules, block_q=block_q, heads=heads).run()


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
    rules: Rules,
    blocks: TileBlocks,
    dtype: jnp.dtype,  # of the result
    vmem_limit_bytes: int,
    interpret: Any = False,
) -> jax.Array:  # [tokens, kv_heads, group, lanes]
    """Returns the attention of sequences `counts[0]` to `counts[1]`; other rows are garbage."""
    tokens, kv_heads, group, lanes = q.shape
    pages, block_q = blocks.pages, blocks.block_q
    num_tiles = -(-tokens // block_q)
    num_items, tiles, owners = _items(cu_q_lens, counts, num_tiles, block_q)
    q = jnp.pad(q, ((0, num_tiles * block_q - tokens), (0, 0), (0, 0), (0, 0)))
    q = q.reshape(num_tiles, block_q, kv_heads, group, lanes).transpose(0, 2, 3, 1, 4)
    q = q.reshape(num_tiles, kv_heads, group * block_q, lanes)
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
        functools.partial(_kernel, pages=pages, rules=rules, block_q=block_q, heads=blocks.heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, dtype),
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
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="attend_tiles",
    )(
        *(num_items.reshape(1), tiles, owners, kv_lens, cu_q_lens),
        *(table, table, factors, sinks, q, cache),
    )
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
