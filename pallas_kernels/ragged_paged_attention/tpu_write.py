"""The TPU kernel that writes the rows of sequences of several tokens to their pages.

Pages are read, patched and written back whole: the pipeline of Pallas moves them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tpu_blocks import WriteBlocks
from pallas_kernels.ragged_paged_attention.tpu_pages import select


def _kernel(
    # scalars
    ids_ref,  # [items] i32, page to patch
    starts_ref,  # [items] i32, first row of the page to write
    stops_ref,  # [items] i32, one past the last
    sources_ref,  # [items] i32, row of the new rows that belongs to row 0 of the page
    # inputs
    near_ref,  # [heads, sides, page_size, lanes], the block of new rows that holds the source
    far_ref,  # [heads, sides, page_size, lanes], the block after it
    page_ref,  # [heads, sides, page_size, lanes]
    # outputs
    out_ref,  # [heads, sides, page_size, lanes], the same page
):
    item = pl.program_id(0)
    heads, sides, page_size, lanes = page_ref.shape
    offset = lax.rem(sources_ref[item], page_size)
    row = lax.broadcasted_iota(jnp.int32, (page_size, lanes), 0)
    is_new = (row >= starts_ref[item]) & (row < stops_ref[item])
    # Rows are moved as 32-bit ones: those of smaller types share registers with their neighbours.
    shift = lax.rem(2 * page_size - offset, 2 * page_size)

    def patch(index, _):
        head, side = lax.div(index, sides), lax.rem(index, sides)
        rows = jnp.concatenate([near_ref[head, side], far_ref[head, side]], axis=0)
        rows = pltpu.roll(rows.astype(jnp.float32), shift, 0)[:page_size]
        old = page_ref[head, side]
        out_ref[head, side] = select(is_new, rows.astype(old.dtype), old)

    lax.fori_loop(0, heads * sides, patch, None)


def write_pages(
    new: jax.Array,  # [tokens, kv_heads, sides, lanes], in the cache's type
    cache: jax.Array,  # [pages, kv_heads, sides, page_size, lanes]
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
    *,
    blocks: WriteBlocks,
    vmem_limit_bytes: int,
    interpret: Any = False,
) -> jax.Array:
    """Returns the cache with the rows of sequences `counts[0]` to `counts[1]` written."""
    pages, heads = blocks.pages, blocks.heads
    tokens, page_size = new.shape[0], pages.page_size
    num_items, *items = _items(
        kv_lens, page_table, cu_q_lens, counts,
        tokens=tokens, num_pages=cache.shape[0], page_size=page_size,
    )  # fmt: skip
    # 8-bit values are exact in bfloat16, whose rows the kernel can read at any page size.
    carried = new.astype(pages.compute_dtype).transpose(1, 2, 0, 3)
    padding = (page_size, 2 * page_size + -tokens % page_size)
    carried = jnp.pad(carried, ((0, 0), (0, 0), padding, (0, 0)))

    def of_rows(distance):
        return pl.BlockSpec(
            (heads, *pages.shape[1:]),
            lambda item, part, ids, starts, stops, sources: (
                part, 0, lax.div(sources[item], page_size) + distance, 0
            ),
        )  # fmt: skip

    of_page = pl.BlockSpec(
        (None, heads, *pages.shape[1:]),
        lambda item, part, ids, *_: (ids[item], part, 0, 0, 0),
    )
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(jnp.maximum(num_items, 1), pages.kv_heads // heads),
            in_specs=[of_rows(0), of_rows(1), of_page],
            out_specs=of_page,
        ),
        input_output_aliases={6: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        interpret=interpret,
        name="write_pages",
    )(*items, carried, carried, cache)


def _items(
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
    *,
    tokens: int,
    num_pages: int,
    page_size: int,
) -> tuple[jax.Array, ...]:
    """Returns the number of pages to patch, and of each the kernel's four scalars."""
    sequences = kv_lens.shape[0]
    sequence = jnp.arange(sequences, dtype=jnp.int32)
    is_long = (sequence >= counts[0]) & (sequence < counts[1])
    first_position = kv_lens - (cu_q_lens[1:] - cu_q_lens[:-1])
    first_page = first_position // page_size
    touched = jnp.where(is_long, (kv_lens - 1) // page_size + 1 - first_page, 0)
    ends = jnp.cumsum(touched, dtype=jnp.int32)
    # A sequence of n tokens touches at most (n - 2) // page_size + 2 pages.
    max_items = tokens // page_size + 2 * min(sequences, max(tokens // 2, 1))
    item = jnp.arange(max_items, dtype=jnp.int32)
    owner = (ends[None, :] <= item[:, None]).sum(1, dtype=jnp.int32)
    owner = jnp.minimum(owner, sequences - 1)
    page = first_page[owner] + item - (ends - touched)[owner]
    page = jnp.clip(page, 0, page_table.shape[1] - 1)
    start = jnp.maximum(first_position[owner] - page * page_size, 0)
    stop = jnp.minimum(kv_lens[owner] - page * page_size, page_size)
    # Row r of the page is token cu_q_lens + page * page_size + r - first_position.
    source = cu_q_lens[owner] + page * page_size - first_position[owner] + page_size
    # Past the last item: a page that is written back as it was, for a step that has none.
    is_item = item < ends[-1]
    return (
        ends[-1],
        jnp.clip(page_table[owner, page], 0, num_pages - 1),
        start,
        jnp.where(is_item, stop, 0),
        jnp.where(is_item, source, 0),
    )
