"""Attention as models call it: the paged kernel of this platform."""

from __future__ import annotations

import jax

from jaxserve.batch import Batch
from pallas_kernels.ragged_paged_attention import Backend, LayerCache, ragged_paged_attention


def attend(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    cache: LayerCache,
    batch: Batch,
    *,
    scale: float,
    sliding_window: int | None = None,  # keys seen, the token's own included
    soft_cap: float | None = None,  # logits become soft_cap * tanh(logits / soft_cap)
    sinks: jax.Array | None = None,  # [heads] f32, a logit that takes mass and gives no value
) -> tuple[jax.Array, LayerCache]:
    """Writes keys and values to their pages and attends. Returns `[tokens, heads, head_dim]`."""
    with jax.named_scope("attention"):
        out, cache = ragged_paged_attention(
            q,
            k,
            v,
            cache,
            batch.kv_lens,
            batch.page_table,
            batch.cu_q_lens,
            batch.counts,
            backend=batch.attention,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
        )
        return out.astype(q.dtype), cache


def backend_for(platform: str) -> Backend:
    """Returns the attention backend of a platform ("cpu", "gpu", "tpu")."""
    del platform  # the XLA reference serves every platform until a kernel of its own exists
    return "reference"
