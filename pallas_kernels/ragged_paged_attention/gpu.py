"""Ragged paged attention on NVIDIA GPUs of the Hopper generation, in Pallas' Mosaic GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.gpu_blocks import (
    Blocks,
    blocks_for,
    check_blocks,
    check_pages,
)
from pallas_kernels.ragged_paged_attention.gpu_decode import attend_decode
from pallas_kernels.ragged_paged_attention.gpu_prefill import attend_prefill
from pallas_kernels.ragged_paged_attention.gpu_step import Kernels, attend_step, pages_of

_KERNELS = Kernels(attend_decode, attend_prefill)


def page_shapes(
    num_pages: int, *, page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns one layer's keys and values, `[pages, page_size, kv_heads, head_dim]` each.

    Raises ValueError for what the kernels cannot read.
    """
    check_pages(page_size=page_size, head_dim=head_dim, dtype=jnp.dtype(dtype))
    return pages_of(
        num_pages, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )


def device_refusal(device: jax.Device, dtype: jnp.dtype | None = None) -> str | None:
    """Returns why the kernels cannot run on a device; None if they can, with pages of any type."""
    del dtype
    capability = str(device.compute_capability)
    if capability.partition(".")[0] == "9":
        return None
    return (
        "the kernels use the matrix instruction of compute capability 9.0 (Hopper), "
        f"which {capability} does not have"
    )


def attend(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    cache: tuple[jax.Array, ...],  # keys, values [pages, page_size, kv_heads, head_dim]
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32: one-token sequences, all sequences
    *,
    blocks: Blocks | None = None,  # None: those of the table
    interpret: bool = False,
    **rules: Any,  # scale, window, cap, sinks, scales
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention of `api.ragged_paged_attention` and the cache with the new rows."""
    _, page_size, _, head_dim = cache[0].shape
    stored = cache[0].dtype
    check_pages(page_size=page_size, head_dim=head_dim, dtype=stored)
    if blocks is None:
        blocks = blocks_for(head_dim, stored)
    check_blocks(blocks, head_dim, stored)
    return attend_step(
        _KERNELS,
        q,
        k,
        v,
        cache,
        kv_lens,
        page_table,
        cu_q_lens,
        counts,
        blocks=blocks,
        interpret=interpret,
        **rules,
    )
