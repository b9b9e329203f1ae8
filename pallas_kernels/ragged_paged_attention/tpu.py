"""Ragged paged attention for TPUs in Pallas: which kernels a step needs, and their operands."""

from __future__ import annotations

import dataclasses, os
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import targets
from pallas_kernels.ragged_paged_attention import tpu_decode, tpu_tiles, tpu_write
from pallas_kernels.ragged_paged_attention.tpu_pages import LOG2_E, MASKED, Pages, Rules


def page_shapes(
    num_pages: int, *, page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns one layer's pages, `[pages, kv_heads, sides, page_size, lanes]` (see `tpu_pages`)."""
    pages = Pages(
        kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, dtype=jnp.dtype(dtype)
    )
    return (jax.ShapeDtypeStruct((num_pages, *pages.shape), dtype),)


def attend(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    cache: tuple[jax.Array, ...],  # one array of `page_shapes`
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
    interpret: Any = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention of `api.ragged_paged_attention` and the cache with the new rows."""
    tokens, heads, head_dim = q.shape
    kv_heads, sequences = k.shape[1], kv_lens.shape[0]
    (stored,) = cache
    pages = Pages(
        kv_heads=kv_heads, head_dim=head_dim, page_size=stored.shape[3], dtype=stored.dtype
    )
    pages = dataclasses.replace(pages, per_block=int(os.environ.get('PB','8')))
    group = heads // kv_heads
    factor = jnp.float32(scale * LOG2_E if soft_cap is None else scale / soft_cap)
    factors = jnp.stack([
        factor if k_scale is None else factor * k_scale,
        jnp.float32(1.0) if v_scale is None else v_scale,
    ])  # fmt: skip
    if sinks is None:
        sinks = jnp.full((heads,), MASKED, jnp.float32)
    sinks = jnp.broadcast_to((sinks * LOG2_E).reshape(kv_heads, group, 1), (kv_heads, group, 128))
    rules = Rules(sliding_window=sliding_window, soft_cap=soft_cap)
    new = stored_rows(k, v, k_scale, v_scale, pages)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, pages.lanes - head_dim))).astype(pages.compute_dtype)
    q = q.reshape(tokens, kv_heads, group, pages.lanes)
    common = {"pages": pages, "rules": rules, "vmem_bytes": targets.TPU.vmem_bytes, "interpret": interpret}
    out, stored = tpu_decode.attend_one(
        q[:sequences], new[:sequences], stored, kv_lens, page_table, counts[0], factors, sinks,
        rows=8, **common,
    )  # fmt: skip
    if sequences < tokens:  # else every sequence has one token
        tables = (kv_lens, page_table, cu_q_lens, counts)
        stored = tpu_write.write_pages(
            new, stored, *tables, pages=pages, heads=kv_heads,
            vmem_bytes=targets.TPU.vmem_bytes, interpret=interpret,
        )
        tiles = tpu_tiles.attend_tiles(q, stored, *tables, factors, sinks, block_q=int(os.environ.get('BQ','64')), **common)
        row = jnp.arange(tokens, dtype=jnp.int32)[:, None, None, None]
        out = jnp.pad(out, ((0, tokens - sequences), (0, 0), (0, 0), (0, 0)))
        tiles = jnp.where(row < cu_q_lens[counts[1]], tiles, jnp.zeros((), tiles.dtype))
        out = jnp.where(row < counts[0], out, tiles)
    out = out.reshape(tokens, heads, pages.lanes)
    return out[..., pages.values_at : pages.values_at + head_dim], (stored,)


def stored_rows(
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    pages: Pages,
) -> jax.Array:  # [tokens, kv_heads, sides, lanes]
    """Returns keys and values as the pages keep them."""
    k, v = (_stored(side, scale, pages.dtype) for side, scale in ((k, k_scale), (v, v_scale)))
    if pages.is_packed:
        half = pages.lanes // 2
        rows = jnp.concatenate([_pad(k, half), _pad(v, half)], axis=2)
        return rows[:, :, None, :]
    return jnp.stack([_pad(k, pages.lanes), _pad(v, pages.lanes)], axis=2)


def _stored(rows: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    if scale is not None:
        rows = rows.astype(jnp.float32) / scale
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        rows = jnp.clip(jnp.round(rows.astype(jnp.float32)), limits.min, limits.max)
    return rows.astype(dtype)


def _pad(rows: jax.Array, lanes: int) -> jax.Array:
    return jnp.pad(rows, ((0, 0), (0, 0), (0, lanes - rows.shape[2])))
