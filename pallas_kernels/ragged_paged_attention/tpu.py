"""Ragged paged attention for TPUs in Pallas: which kernels a step needs, and their operands.

A step of one-token sequences is one kernel, which also writes their keys and values. Where a step
has longer sequences too, a second kernel writes their pages and a third attends from tiles of
queries: the tiles of a sequence read what others of it wrote, so that writing while attending
would need each to wait for the ones before it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.rows import to_stored
from pallas_kernels.ragged_paged_attention.tpu_blocks import (
    decode_blocks,
    tile_blocks,
    write_blocks,
)
from pallas_kernels.ragged_paged_attention.tpu_decode import attend_one
from pallas_kernels.ragged_paged_attention.tpu_pages import LANES, LOG2_E, MASKED, Pages, Rules
from pallas_kernels.ragged_paged_attention.tpu_tiles import attend_tiles
from pallas_kernels.ragged_paged_attention.tpu_write import write_pages
from pallas_kernels.targets import TPU, TpuTarget


def page_shapes(
    num_pages: int, *, page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns one layer's pages, `[pages, kv_heads, sides, page_size, lanes]` (see `tpu_pages`)."""
    dtype = jnp.dtype(dtype)
    pages = Pages(kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    return (jax.ShapeDtypeStruct((num_pages, *pages.shape), dtype),)


def device_refusal(device: jax.Device, dtype: jnp.dtype | None = None) -> str | None:
    """Returns why the kernels cannot run on a device; None if they can, with pages of any type."""
    del dtype
    if device.device_kind in TPU.device_kinds:
        return None
    return f"the TPU kernels are made for {', '.join(TPU.device_kinds)}, not {device.device_kind}"


def attend(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    cache: tuple[jax.Array, ...],  # the one array of `page_shapes`
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
    target: TpuTarget = TPU,
    interpret: Any = False,  # True or pltpu.InterpretParams: on a CPU, for tests
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention of `api.ragged_paged_attention` and the cache with the new rows.

    Rows past the last sequence are zeros. Raises ValueError for shapes that VMEM or SMEM cannot
    hold.
    """
    (stored,) = cache
    # Addresses are not checked on the device: what is wrong here must not reach other memory.
    page_table = jnp.clip(page_table, 0, stored.shape[0] - 1)
    kv_lens = jnp.minimum(kv_lens, page_table.shape[1] * stored.shape[3])
    tokens, heads, head_dim = q.shape
    kv_heads, sequences = k.shape[1], kv_lens.shape[0]
    pages = Pages(
        kv_heads=kv_heads, head_dim=head_dim, page_size=stored.shape[3], dtype=stored.dtype
    )
    if stored.shape[1:] != pages.shape:
        raise ValueError(f"{stored.shape=} must end in {pages.shape} for {k.shape=}")
    shape = (kv_heads, heads // kv_heads, pages.lanes)
    new = _stored_rows(k, v, k_scale, v_scale, pages)
    rows = _pad(q, pages.lanes).astype(pages.compute_dtype).reshape(tokens, *shape)
    factors = _factors(scale, soft_cap, k_scale, v_scale)
    rules = Rules(sliding_window=sliding_window, soft_cap=soft_cap)
    logits = jnp.full((heads,), MASKED, jnp.float32) if sinks is None else sinks * LOG2_E
    logits = jnp.broadcast_to(logits.reshape(*shape[:2], 1), (*shape[:2], LANES))
    width = page_table.shape[1]
    options: dict[str, Any] = {"vmem_limit_bytes": target.vmem_bytes, "interpret": interpret}

    blocks = decode_blocks(
        pages, group=shape[1], sequences=sequences, pages_per_sequence=width, target=target
    )
    out, stored = attend_one(
        rows[:sequences], new[:sequences], stored, kv_lens, page_table, counts[0], factors, logits,
        rules=rules, blocks=blocks, dtype=q.dtype, **options,
    )  # fmt: skip
    if sequences < tokens:  # else every sequence has one token
        tables = (kv_lens, page_table, cu_q_lens, counts)
        patched = write_blocks(pages, target=target)
        stored = write_pages(new, stored, *tables, blocks=patched, **options)
        tiled = tile_blocks(
            pages, group=shape[1], tokens=tokens, pages_per_sequence=width, target=target
        )
        tiles = attend_tiles(
            rows, stored, *tables, factors, logits,
            rules=rules, blocks=tiled, dtype=q.dtype, **options,
        )  # fmt: skip
        out = _joined(out, tiles, cu_q_lens, counts)
    out = out.reshape(tokens, heads, pages.lanes)
    return out[..., pages.values_at : pages.values_at + head_dim], (stored,)


def _factors(
    scale: float,
    soft_cap: float | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
) -> jax.Array:  # [2] f32
    """Returns what products with stored keys, and means of stored values, are multiplied by."""
    factor = jnp.float32(scale * LOG2_E if soft_cap is None else scale / soft_cap)
    one = jnp.float32(1.0)
    return jnp.stack([
        factor * (one if k_scale is None else k_scale), one if v_scale is None else v_scale
    ])  # fmt: skip


def _joined(
    ones: jax.Array,  # [sequences, kv_heads, group, lanes]
    tiles: jax.Array,  # [tokens, kv_heads, group, lanes]
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
) -> jax.Array:  # [tokens, kv_heads, group, lanes]
    """Returns rows of one-token sequences from `ones`, the others from `tiles`, then zeros."""
    row = jnp.arange(len(tiles), dtype=jnp.int32)[:, None, None, None]
    ones = jnp.pad(ones, ((0, len(tiles) - len(ones)), (0, 0), (0, 0), (0, 0)))
    tiles = jnp.where(row < cu_q_lens[counts[1]], tiles, jnp.zeros((), tiles.dtype))
    return jnp.where(row < counts[0], ones, tiles)


def _stored_rows(
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    pages: Pages,
) -> jax.Array:  # [tokens, kv_heads, sides, lanes]
    """Returns keys and values as the pages keep them."""
    k, v = (to_stored(side, scale, pages.dtype) for side, scale in ((k, k_scale), (v, v_scale)))
    if pages.is_packed:
        half = pages.values_at
        return jnp.concatenate([_pad(k, half), _pad(v, half)], axis=2)[:, :, None, :]
    return jnp.stack([_pad(k, pages.lanes), _pad(v, pages.lanes)], axis=2)


def _pad(
    rows: jax.Array,  # [tokens, heads, head_dim]
    lanes: int,
) -> jax.Array:  # [tokens, heads, lanes]
    return jnp.pad(rows, ((0, 0), (0, 0), (0, lanes - rows.shape[2])))
