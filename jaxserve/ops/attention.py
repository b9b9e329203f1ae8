"""Attention as models call it: the paged kernel of this platform."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxserve.batch import Batch, ScaledCache
from pallas_kernels.ragged_paged_attention import Backend, ragged_paged_attention


def attend(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    cache: Any,  # LayerCache or ScaledCache; comes back as it came
    batch: Batch,
    *,
    scale: float,
    sliding_window: int | None = None,  # keys seen, the token's own included
) -> tuple[jax.Array, Any]:
    """Writes keys and values to their pages and attends. Returns `[tokens, heads, head_dim]`."""
    if isinstance(cache, ScaledCache):
        pages, k_scale, v_scale = cache.pages, cache.k_scale, cache.v_scale
    else:
        pages, k_scale, v_scale = cache, None, None
    with jax.named_scope("attention"):
        out, pages = ragged_paged_attention(
            q,
            k,
            v,
            pages,
            batch.kv_lens,
            batch.page_table,
            batch.cu_q_lens,
            batch.counts,
            backend=batch.attention,
            scale=scale,
            sliding_window=sliding_window,
            k_scale=k_scale,
            v_scale=v_scale,
        )
    out = out.astype(q.dtype)
    if isinstance(cache, ScaledCache):
        return out, dataclasses.replace(cache, pages=pages)
    return out, pages


def backend_for(platform: str) -> Backend:
    """Returns the attention backend of a platform ("cpu", "gpu", "tpu")."""
    del platform  # the XLA reference serves every platform until a kernel of its own exists
    return "reference"
