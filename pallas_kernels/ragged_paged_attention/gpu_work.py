"""How the GPU kernels divide a step: which program computes which rows over which keys."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.gpu_blocks import DecodeBlocks


def decode_items(
    context: jax.Array,  # [sequences] i32, 0 for none
    blocks: DecodeBlocks,
    groups: int,
    sliding_window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the work list `[items, 4]` i32 and each sequence's first item `[sequences + 1]` i32.

    An item is (sequence, first block, end block, first position seen). There are as many as fill
    the device, if contexts are long enough, and no more; the rest of the list is empty items.
    """
    size = blocks.block_kv
    first = jnp.zeros_like(context)
    if sliding_window is not None:
        first = jnp.maximum(context - sliding_window, 0)
    start = first // size
    num_blocks = (context + size - 1) // size - start
    wanted = max(1, blocks.programs // groups)
    share = jnp.maximum((num_blocks.sum() + wanted - 1) // wanted, blocks.min_split)
    num_items = (num_blocks + share - 1) // share
    piece = (num_blocks + num_items - 1) // jnp.maximum(num_items, 1)
    ends = jnp.cumsum(num_items, dtype=jnp.int32)
    first_item = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])

    item = jnp.arange(context.shape[0] + wanted, dtype=jnp.int32)
    owner = (item[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32)
    is_real = owner < context.shape[0]
    owner = jnp.minimum(owner, context.shape[0] - 1)
    begin = start[owner] + (item - first_item[owner]) * piece[owner]
    end = jnp.minimum(begin + piece[owner], start[owner] + num_blocks[owner])
    end = jnp.where(is_real, end, begin)
    return jnp.stack([owner, begin, end, first[owner]], axis=1), first_item


def prefill_items(
    kv_lens: jax.Array,  # [sequences] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
    tokens: int,
    tile_tokens: int,
) -> jax.Array:  # [items, 4] i32
    """Returns the work list of the sequences of several tokens.

    An item is (sequence, first token's row, number of tokens, first token's position). Those with
    most keys come first, so that a long one is not left for the end; empty ones fill the list.
    """
    sequences = kv_lens.shape[0]
    sequence = jnp.arange(sequences, dtype=jnp.int32)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    is_tiled = (sequence >= counts[0]) & (sequence < counts[1])
    num_tiles = jnp.where(is_tiled, (q_lens + tile_tokens - 1) // tile_tokens, 0)
    ends = jnp.cumsum(num_tiles, dtype=jnp.int32)

    index = jnp.arange(tokens // tile_tokens + min(sequences, tokens // 2), dtype=jnp.int32)
    item = ends[-1] - 1 - index
    owner = (item[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32)
    offset = (item - ends[owner] + num_tiles[owner]) * tile_tokens
    count = jnp.where(item >= 0, jnp.minimum(q_lens[owner] - offset, tile_tokens), 0)
    position = kv_lens[owner] - q_lens[owner] + offset
    return jnp.stack([owner, cu_q_lens[owner] + offset, count, position], axis=1)


class Walk(NamedTuple):
    """The blocks `[begin, end)` that a tile sees; every row sees all of `[whole, part)`."""

    first: jax.Array  # [] i32, first position seen
    begin: jax.Array
    whole: jax.Array
    part: jax.Array
    end: jax.Array


def walk_of(
    position: jax.Array,  # [] i32, of the tile's first token
    num_tokens: jax.Array,  # [] i32
    sliding_window: int | None,
    block_kv: int,
) -> Walk:
    """Returns the blocks of keys that a tile of queries visits."""

    def block_of(position: jax.Array) -> jax.Array:
        return lax.div(position, jnp.int32(block_kv))

    zero = jnp.int32(0)
    seen_to = position + num_tokens
    end, part = block_of(seen_to + (block_kv - 1)), block_of(position + 1)
    if sliding_window is None:
        return Walk(zero, zero, zero, part, end)
    first = jnp.maximum(position + 1 - sliding_window, zero)
    whole = block_of(jnp.maximum(seen_to - sliding_window, zero) + (block_kv - 1))
    whole = jnp.minimum(whole, end)
    return Walk(first, block_of(first), whole, jnp.maximum(part, whole), end)
