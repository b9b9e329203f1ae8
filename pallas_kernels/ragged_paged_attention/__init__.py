"""Attention over a paged KV cache for a ragged batch: one contract, one file per backend."""

from pallas_kernels.ragged_paged_attention.api import (
    KERNELS,
    Backend,
    KVLayout,
    LayerCache,
    device_refusal,
    layout_for,
    ragged_paged_attention,
    refusal,
)

__all__ = [
    "KERNELS",
    "Backend",
    "KVLayout",
    "LayerCache",
    "device_refusal",
    "layout_for",
    "ragged_paged_attention",
    "refusal",
]
