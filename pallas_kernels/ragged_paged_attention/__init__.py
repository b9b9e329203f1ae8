"""Attention over a paged KV cache for a ragged batch: one contract, one file per backend."""

from pallas_kernels.ragged_paged_attention.api import (
    Backend,
    KVLayout,
    LayerCache,
    layout_for,
    ragged_paged_attention,
)

__all__ = ["Backend", "KVLayout", "LayerCache", "layout_for", "ragged_paged_attention"]
