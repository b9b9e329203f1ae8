"""What a step writes to pages, whatever their layout: where each token's row goes, and its bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cache_rows(
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32: one-token sequences, all sequences
    *,
    tokens: int,
    num_pages: int,
    page_size: int,
) -> jax.Array:  # [tokens] i32
    """Returns each token's row of `[pages * page_size]`, or one past the end for padding."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    sequence = (token[:, None] >= cu_q_lens[None, 1:]).sum(1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, kv_lens.shape[0] - 1)
    position = jnp.maximum(kv_lens[sequence] - cu_q_lens[sequence + 1] + token, 0)
    row = page_table[sequence, position // page_size] * page_size + position % page_size
    return jnp.where(token < cu_q_lens[counts[1]], row, num_pages * page_size)


def to_stored(
    rows: jax.Array,  # any shape, float
    scale: jax.Array | None,  # [] f32, what is stored times this is `rows`; None: 1
    dtype: jnp.dtype,  # of the numbers in pages
) -> jax.Array:
    """Returns rows as pages hold them.

    8-bit types and float16 saturate: float8 would become NaN, and float16 an infinity, which times
    a weight of 0 is NaN too.
    """
    if scale is not None:
        rows = rows.astype(jnp.float32) / scale.astype(jnp.float32)
    if dtype.itemsize > 1 and dtype != jnp.float16:
        return rows.astype(dtype)
    rows = rows.astype(jnp.float32)
    limits: jnp.iinfo | jnp.finfo
    if jnp.issubdtype(dtype, jnp.integer):
        limits, rows = jnp.iinfo(dtype), jnp.round(rows)
    else:
        limits = jnp.finfo(dtype)
    return jnp.clip(rows, float(limits.min), float(limits.max)).astype(dtype)
