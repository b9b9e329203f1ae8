"""The attention contract: argument shapes, their validation, and the choice of backend."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention import reference

Backend: TypeAlias = Literal["reference", "tpu", "gpu", "triton"]

# The kernels for each platform, by JAX's names, the best first; any other platform has the
# reference. `gpu` is for one generation, `triton` for what JAX's deprecated lowering still serves.
KERNELS: dict[str, tuple[Backend, ...]] = {"tpu": ("tpu",), "gpu": ("gpu", "triton")}

# Keys and values of one layer; what the arrays mean is the backend's own affair (`KVLayout`).
LayerCache: TypeAlias = tuple[jax.Array, ...]


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """How one backend stores the keys and values of a layer."""

    backend: Backend
    page_size: int  # token positions in one page
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    def shapes(self, num_pages: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the arrays that hold one layer's keys and values, as the backend orders them."""
        return _module(self.backend).page_shapes(
            num_pages,
            page_size=self.page_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
        )

    def page_bytes(self) -> int:
        """Returns the bytes one page takes in one layer."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in self.shapes(1))


class _Module(Protocol):
    """What the file of a backend offers."""

    def page_shapes(
        self, num_pages: int, *, page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the arrays of one layer's pages; ValueError for what the kernel cannot store."""

    def attend(self, *arrays: Any, **options: Any) -> tuple[jax.Array, LayerCache]:
        """Writes and attends, as `ragged_paged_attention` says; its arguments but `backend`."""

    def device_refusal(self, device: jax.Device, dtype: jnp.dtype | None = None) -> str | None:
        """Returns why the kernel cannot run on a device with pages of a type; None if it can."""


def _module(backend: Backend) -> _Module:
    # Not at the top: Pallas takes a second to import, and a CPU never needs it.
    match backend:
        case "tpu":
            from pallas_kernels.ragged_paged_attention import tpu

            return tpu
        case "gpu":
            from pallas_kernels.ragged_paged_attention import gpu

            return gpu
        case "triton":
            from pallas_kernels.ragged_paged_attention import triton

            return triton
        case _:
            assert backend == "reference", backend
            return reference


def device_refusal(
    backend: Backend, device: jax.Device, dtype: jnp.dtype | None = None
) -> str | None:
    """Returns why a backend cannot run on a device, whatever the model; None if it can.

    With a type of pages, why it cannot with those.
    """
    return _module(backend).device_refusal(device, dtype)


def refusal(
    layout: KVLayout,
    device: jax.Device,
    *,
    heads: int,
    tokens: int,  # of the largest step
    sequences: int,
    pages_per_sequence: int,
) -> str | None:
    """Returns why the layout's backend cannot serve a layer on a device; None if it can.

    What a kernel refuses, it refuses at trace time: a layer is traced, for a step of `tokens` and
    for one of a token a sequence.
    """
    if (reason := device_refusal(layout.backend, device, layout.dtype)) is not None:
        return reason
    attention = functools.partial(ragged_paged_attention, backend=layout.backend, scale=1.0)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    try:
        for count in {sequences, max(tokens, sequences)}:
            q = array(count, heads, layout.head_dim, dtype=jnp.bfloat16)
            new = array(count, layout.kv_heads, layout.head_dim, dtype=jnp.bfloat16)
            jax.eval_shape(
                attention,
                q,
                new,
                new,
                layout.shapes(pages_per_sequence),
                array(sequences),
                array(sequences, pages_per_sequence),
                array(sequences + 1),
                array(2),
            )
    except ValueError as error:
        return str(error)
    return None


def layout_for(
    backend: Backend, *, page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> KVLayout:
    """Returns the layout that `backend` reads and writes."""
    return KVLayout(
        backend=backend, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )


def ragged_paged_attention(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim], of this step's tokens
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    cache: LayerCache,  # pages of this layer; donated by the caller's jit
    kv_lens: jax.Array,  # [sequences] i32, context length with this step's tokens
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32, where each sequence's tokens begin
    counts: jax.Array,  # [2] i32: sequences of one token (they come first), all sequences
    *,
    backend: Backend,
    scale: float,
    sliding_window: int | None = None,  # keys seen, the token's own included
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # [heads] f32, a logit that takes mass and gives no value
    k_scale: jax.Array | None = None,  # [] f32, stored keys times this are the keys
    v_scale: jax.Array | None = None,  # [] f32
) -> tuple[jax.Array, LayerCache]:
    """Writes `k` and `v` to their pages and attends. Returns `[tokens, heads, head_dim]`, cache.

    Attention is causal, aligned to the end of the context: token r of a sequence has position
    `kv_len - q_len + r`. Where there are as many sequences as tokens, each has one token or none;
    sequences of several come after `counts[0]`. Rows past the last sequence are garbage. Raises
    ValueError at trace time for shapes that do not agree. The semantics are those of TPU ragged
    paged attention (https://arxiv.org/abs/2604.15464).
    """
    _check(q, k, v, kv_lens, page_table, cu_q_lens, counts, sliding_window)
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"{sinks.shape=} must be ({q.shape[1]},)")
    for scale_of in (k_scale, v_scale):
        if scale_of is not None and scale_of.shape:
            raise ValueError(f"a scale has shape {scale_of.shape}; it must be ()")
    return _module(backend).attend(
        q,
        k,
        v,
        cache,
        kv_lens,
        page_table,
        cu_q_lens,
        counts,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _check(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
    sliding_window: int | None,
) -> None:
    tokens, heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[0] != tokens or k.shape[2] != head_dim:
        raise ValueError(f"{q.shape=} does not go with {k.shape=} and {v.shape=}")
    if heads % k.shape[1]:
        raise ValueError(f"{heads=} must be a multiple of kv_heads={k.shape[1]}")
    sequences = kv_lens.shape[0]
    if page_table.shape[0] != sequences or cu_q_lens.shape != (sequences + 1,):
        raise ValueError(f"{kv_lens.shape=}, {page_table.shape=} and {cu_q_lens.shape=} disagree")
    if sequences > tokens:
        raise ValueError(f"{sequences=} cannot exceed {tokens=}: each has at least one token")
    if counts.shape != (2,):
        raise ValueError(f"{counts.shape=} must be (2,)")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"{sliding_window=} must be at least 1")
