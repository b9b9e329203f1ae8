"""A step's attention on an NVIDIA GPU, whichever way its kernels are written.

A step of one-token sequences is one launch that splits contexts and one that merges. A step that
holds longer sequences adds a launch for their tiles: the two kinds want different tiles, registers
and shared memory, and a launch costs less than a program that is made for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.gpu_blocks import ROWS, Blocks, compute_dtype
from pallas_kernels.ragged_paged_attention.gpu_softmax import MASKED
from pallas_kernels.ragged_paged_attention.rows import cache_rows, to_stored


class Kernels(NamedTuple):
    """The two kernels of a step."""

    attend_decode: Callable[..., jax.Array]  # from each sequence's newest token
    attend_prefill: Callable[..., jax.Array]  # from sequences of several; others' rows are garbage


def pages_of(
    num_pages: int, *, page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns one layer's keys and values, `[pages, page_size, kv_heads, head_dim]` each."""
    pages = jax.ShapeDtypeStruct((num_pages, page_size, kv_heads, head_dim), jnp.dtype(dtype))
    return (pages, pages)


def attend_step(
    kernels: Kernels,
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    cache: tuple[jax.Array, ...],  # keys, values [pages, page_size, kv_heads, head_dim]
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32: one-token sequences, all sequences
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # [heads] f32
    k_scale: jax.Array | None = None,  # [] f32
    v_scale: jax.Array | None = None,  # [] f32
    blocks: Blocks,
    interpret: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention of `api.ragged_paged_attention` and the cache with the new rows."""
    tokens, heads, _ = q.shape
    sequences = kv_lens.shape[0]
    _, page_size, kv_heads, _ = cache[0].shape
    stored = cache[0].dtype
    if sliding_window is not None and sliding_window >= page_table.shape[1] * page_size:
        sliding_window = None  # no context is longer
    cache = write(cache, k, v, kv_lens, page_table, cu_q_lens, counts, k_scale, v_scale)

    # [1] f32: the kernels' products are of stored keys.
    factor = jnp.full((1,), scale, jnp.float32)
    if k_scale is not None:
        factor *= k_scale.astype(jnp.float32)
    if sinks is None:
        sinks = jnp.full((heads,), MASKED, jnp.float32)
    # A tile holds the query heads of one kv head; where they are too many, of a part of them.
    group = heads // kv_heads
    parts = -(-group // ROWS)
    grouped = _group_heads(q.astype(compute_dtype(stored)), kv_heads, parts)
    grouped_sinks = _group_heads(sinks.astype(jnp.float32)[None, :, None], kv_heads, parts)
    options: dict[str, Any] = {
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
        "interpret": interpret,
    }

    is_decoding = jnp.arange(sequences) < counts[0]
    out = kernels.attend_decode(
        grouped[:sequences],
        cache,
        jnp.where(is_decoding, kv_lens, 0),
        page_table,
        factor,
        grouped_sinks[0, :, :, 0],
        blocks=blocks.decode,
        **options,
    )
    if sequences < tokens:  # else every sequence has one token
        tiled = kernels.attend_prefill(
            grouped,
            cache,
            kv_lens,
            page_table,
            cu_q_lens,
            counts,
            factor,
            grouped_sinks[0, :, :, 0],
            blocks=blocks.prefill,
            **options,
        )
        out = jnp.pad(out, ((0, tokens - sequences), (0, 0), (0, 0), (0, 0)))
        row = jnp.arange(tokens)[:, None, None, None]
        # Rows of no sequence were never written.
        tiled = jnp.where(row < cu_q_lens[counts[1]], tiled, jnp.zeros((), tiled.dtype))
        out = jnp.where(row < counts[0], out, tiled)
    out = _ungroup_heads(out, kv_heads, group)
    if v_scale is not None:
        out = out.astype(jnp.float32) * v_scale.astype(jnp.float32)
    return out.astype(q.dtype), cache


def write(
    cache: tuple[jax.Array, ...],
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
    k_scale: jax.Array | None,  # [] f32
    v_scale: jax.Array | None,  # [] f32
) -> tuple[jax.Array, ...]:
    """Puts each token's key and value at its position's row; padding tokens write nowhere."""
    num_pages, page_size, kv_heads, head_dim = cache[0].shape
    row = cache_rows(
        kv_lens,
        page_table,
        cu_q_lens,
        counts,
        tokens=k.shape[0],
        num_pages=num_pages,
        page_size=page_size,
    )

    def put(pages: jax.Array, rows: jax.Array, scale: jax.Array | None) -> jax.Array:
        flat = pages.reshape(num_pages * page_size, kv_heads, head_dim)
        rows = to_stored(rows, scale, pages.dtype)
        return flat.at[row].set(rows, mode="drop").reshape(pages.shape)

    return put(cache[0], k, k_scale), put(cache[1], v, v_scale)


def _group_heads(
    x: jax.Array,  # [tokens, heads, width]
    kv_heads: int,
    parts: int,
) -> jax.Array:  # [tokens, kv_heads * parts, group, width]
    """Returns the heads by kv head, each group cut in `parts` and padded to equal ones."""
    tokens, heads, width = x.shape
    x = x.reshape(tokens, kv_heads, heads // kv_heads, width)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % parts), (0, 0)))
    return x.reshape(tokens, kv_heads * parts, -1, width)


def _ungroup_heads(
    x: jax.Array,  # [tokens, kv_heads * parts, group, head_dim]
    kv_heads: int,
    group: int,
) -> jax.Array:  # [tokens, heads, head_dim]
    """Undoes `_group_heads`; `group` is the number of query heads that a kv head has."""
    tokens, _, _, head_dim = x.shape
    return x.reshape(tokens, kv_heads, -1, head_dim)[:, :, :group].reshape(tokens, -1, head_dim)
