"""Attention as models call it, and the choice of the kernel behind it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxserve.batch import Batch, LayerState, ScaledCache
from jaxserve.errors import ConfigError
from pallas_kernels.ragged_paged_attention import (
    KERNELS,
    Backend,
    KVLayout,
    layout_for,
    ragged_paged_attention,
    refusal,
)


def attend(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    cache: LayerState,  # comes back as it came
    batch: Batch,
    *,
    scale: float,
    sliding_window: int | None = None,  # keys seen, the token's own included
    soft_cap: float | None = None,  # logits become soft_cap * tanh(logits / soft_cap)
    sinks: jax.Array | None = None,  # [heads] f32, a logit that takes mass and gives no value
) -> tuple[jax.Array, LayerState]:
    """Writes keys and values to their pages and attends. Returns `[tokens, heads, head_dim]`."""
    dtype = q.dtype
    pages = cache.pages if isinstance(cache, ScaledCache) else cache
    if isinstance(cache, ScaledCache):
        # Scales of keys may as well be on queries, and those of values on the result: kernels
        # see numbers that fit their pages.
        q = _by_channel(q, cache.k_scale)
        k = k.astype(jnp.float32) / cache.k_scale[None]
        v = v.astype(jnp.float32) / cache.v_scale[None]
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
            soft_cap=soft_cap,
            sinks=sinks,
        )
    if isinstance(cache, ScaledCache):
        out = _by_channel(out, cache.v_scale).astype(dtype)
        return out, dataclasses.replace(cache, pages=pages)
    return out.astype(dtype), pages


def _by_channel(
    x: jax.Array,  # [tokens, heads, head_dim]
    scale: jax.Array,  # [kv_heads, head_dim] f32
) -> jax.Array:
    """Returns x times the scales of each head's kv head, in x's type."""
    group = x.shape[1] // scale.shape[0]
    return (x.astype(jnp.float32) * jnp.repeat(scale, group, axis=0)[None]).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The attention of a model's largest step, as far as a kernel may refuse it."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: jnp.dtype
    tokens: int
    sequences: int
    pages_per_sequence: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a model's attention runs on."""

    layout: KVLayout
    warning: str | None  # why it is not the kernel made for the device

    @property
    def backend(self) -> Backend:
        """Which kernel."""
        return self.layout.backend


def choose_backend(
    requested: Literal["auto"] | Backend, device: jax.Device, shape: LayerShape
) -> Choice:
    """Returns the best of the device's kernels that can serve, else the reference and why.

    Raises ConfigError where another backend is asked for than can serve.
    """
    own = KERNELS.get(device.platform, ())
    if requested not in ("auto", "reference", *own):
        known = " and ".join((*own, "reference"))
        raise ConfigError(f"attention_backend is {requested!r}; a {device.platform} has {known}")
    reasons = []
    for backend in own if requested == "auto" else (requested,):
        layout = _layout(backend, shape)
        reason = None
        if backend != "reference":  # which serves everything
            reason = refusal(
                layout,
                device,
                heads=shape.heads,
                tokens=shape.tokens,
                sequences=shape.sequences,
                pages_per_sequence=shape.pages_per_sequence,
            )
        if reason is None:
            return Choice(layout=layout, warning=None)
        if requested != "auto":
            raise ConfigError(f"attention_backend {backend!r} cannot serve this model: {reason}")
        reasons.append(f"{backend}: {reason}")
    warning = None
    if own:
        warning = f"attention runs on the slower reference, not on a kernel: {'; '.join(reasons)}"
    return Choice(layout=_layout("reference", shape), warning=warning)


def _layout(backend: Backend, shape: LayerShape) -> KVLayout:
    return layout_for(
        backend,
        page_size=shape.page_size,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.kv_dtype,
    )
