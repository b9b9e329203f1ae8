"""What the TPU attention kernels share: the page layout, page copies, and the running softmax.

A page is `[kv_heads, sides, page_size, lanes]`: one contiguous copy, and each head's keys are a
matrix as they lie. Heads of more than 64 numbers are padded to whole rows of 128 lanes and have
two sides, keys and values. Smaller heads have one: keys in lanes 0-63, values in lanes 64-127, so
that no lane is empty and XLA keeps the array in this order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MASKED = -1e30  # finite: the difference of two is 0, not NaN
LOG2_E = 1.4426950408889634  # the hardware has 2**x: logits are kept times this
LANES = 128
HALF = LANES // 2
_UNROLLED = 8  # page copies issued between two branches
PAGE_SIZES = (16, 32, 64, 128, 256)
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8)


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The layout of one layer's pages, and how many a kernel visits at once."""

    kv_heads: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype
    per_block: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            names = ", ".join(jnp.dtype(dtype).name for dtype in DTYPES)
            raise ValueError(f"pages of {self.dtype} cannot be kept; the TPU kernel has {names}")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size={self.page_size} must be one of {PAGE_SIZES}")
        if not 1 <= self.head_dim <= 2 * LANES:
            raise ValueError(f"head_dim={self.head_dim} must be from 1 to {2 * LANES}")

    @property
    def is_packed(self) -> bool:
        """Whether keys and values share a row of lanes."""
        return self.head_dim <= HALF

    @property
    def sides(self) -> int:
        """Returns 1 where keys and values share rows, else 2."""
        return 1 if self.is_packed else 2

    @property
    def lanes(self) -> int:
        """Returns the length of a row."""
        return -(-self.head_dim // LANES) * LANES

    @property
    def values_at(self) -> int:
        """Returns the lane where a row's values begin."""
        return HALF if self.is_packed else 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Returns the shape of one page."""
        return (self.kv_heads, self.sides, self.page_size, self.lanes)

    @property
    def block_kv(self) -> int:
        """Returns the token positions of a block."""
        return self.per_block * self.page_size

    @property
    def granule(self) -> int:
        """Returns the rows that one hardware tile holds: what can be written without its rest."""
        return min(self.page_size, 32 // self.dtype.itemsize)

    @property
    def token_bytes(self) -> int:
        """Returns the bytes of one token position."""
        return self.kv_heads * self.sides * self.lanes * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Returns the bytes of the pages of a block."""
        return self.block_kv * self.token_bytes

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Returns the type of matrix operands: 8-bit keys are exact in bfloat16."""
        return jnp.dtype(jnp.float32 if self.dtype == jnp.float32 else jnp.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What changes a logit besides the keys."""

    sliding_window: int | None
    soft_cap: float | None


class Factors(NamedTuple):
    """Scalars of a call, read from SMEM."""

    logit: jax.Array  # [] f32, what a product of query and stored key is multiplied by
    value: jax.Array  # [] f32, what a mean of stored values is multiplied by


class Softmax(NamedTuple):
    """The running state of a softmax over blocks of keys (https://arxiv.org/abs/1805.02867)."""

    peak: jax.Array  # [..., rows, 128] f32, largest logit so far, times LOG2_E; lanes alike
    total: jax.Array  # [..., rows, 128] f32, sum of exp(logit - peak) over the keys of that lane
    value: jax.Array  # [..., rows, lanes] f32, the same sum weighted by values


class Span(NamedTuple):
    """The pages `[first, end)` of a block that hold positions `[start, stop)` of its own."""

    first: jax.Array  # [] i32
    end: jax.Array  # [] i32
    start: jax.Array  # [] i32, may be negative
    stop: jax.Array  # [] i32, may exceed the block


def span_of(
    block: jax.Array,  # [] i32
    start: jax.Array,  # [] i32, first position that is seen
    stop: jax.Array,  # [] i32, one past the last
    pages: Pages,
) -> Span:
    """Returns which pages of a block hold positions `[start, stop)` of the sequence."""
    start, stop = start - block * pages.block_kv, stop - block * pages.block_kv
    first = jnp.clip(lax.div(jnp.maximum(start, 0), pages.page_size), 0, pages.per_block)
    end = jnp.clip(lax.div(stop + (pages.page_size - 1), pages.page_size), 0, pages.per_block)
    return Span(first, end, start, stop)


def start_fetch(
    cache_ref: Any,  # [pages, kv_heads, sides, page_size, lanes] in HBM
    block_ref: Any,  # [per_block, kv_heads, sides, page_size, lanes]
    semaphore: Any,
    page_of: Any,  # page of the block -> its id
    span: Span,
) -> None:
    """Starts a copy of each page of the span."""

    def start(page: Any, _: None) -> None:
        pltpu.make_async_copy(cache_ref.at[page_of(page)], block_ref.at[page], semaphore).start()

    per_block = block_ref.shape[0]
    some = min(per_block, _UNROLLED)
    is_whole = span.end - span.first == per_block

    @pl.when(is_whole)  # the scalar unit, which issues the copies, overlaps what is not a loop
    def _() -> None:
        def start_some(index: Any, _: None) -> None:
            for page in range(some):
                start(index * some + page, None)

        lax.fori_loop(0, per_block // some, start_some, None)

    @pl.when(jnp.logical_not(is_whole))
    def _() -> None:
        lax.fori_loop(span.first, span.end, start, None)


def wait_fetch(cache_ref: Any, block_ref: Any, semaphore: Any, span: Span) -> None:
    """Waits for all copies of `start_fetch`: a semaphore counts bytes, so once is enough."""
    count = span.end - span.first

    @pl.when(count > 0)
    def _() -> None:
        landed = block_ref.at[pl.ds(0, count)]
        pltpu.make_async_copy(cache_ref.at[pl.ds(0, count)], landed, semaphore).wait()


def clear_unseen(
    block_ref: Any,  # [per_block, kv_heads, sides, page_size, lanes]
    span: Span,
    pages: Pages,
) -> None:
    """Zeroes the values outside the span's positions, where the block has any.

    They may be anything, of any sequence; a weight of zero does not hide a NaN.
    """
    side = pages.sides - 1
    shape = (pages.kv_heads, pages.page_size, pages.lanes)
    row = lax.broadcasted_iota(jnp.int32, shape, 1)

    def clear(page: jax.Array, _: None) -> None:
        position = page * pages.page_size + row
        is_seen = (position >= span.start) & (position < span.stop)
        block_ref[page, :, side] = select(is_seen, block_ref[page, :, side], None)

    lax.fori_loop(0, lax.div(jnp.maximum(span.start, 0) + (pages.page_size - 1), pages.page_size),
                  clear, None)  # fmt: skip
    lax.fori_loop(
        jnp.minimum(lax.div(span.stop, pages.page_size), pages.per_block),
        pages.per_block, clear, None,
    )  # fmt: skip


def select(chosen: jax.Array, yes: jax.Array, no: jax.Array | None) -> jax.Array:
    """Returns `where(chosen, yes, no)`, zeros for no `no`; 8-bit rows take the way of 32-bit."""
    dtype = yes.dtype
    wide = jnp.dtype(jnp.float32) if dtype.itemsize == 1 else dtype
    other = jnp.zeros((), wide) if no is None else no.astype(wide)
    return jnp.where(chosen, yes.astype(wide), other).astype(dtype)


def load_sides(
    block_ref: Any,  # [per_block, kv_heads, sides, page_size, lanes]
    heads: Iterable[Any],  # kv heads to load
    pages: Pages,
) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values `[heads, block_kv, lanes]`, the same array where they are packed."""
    heads = list(heads)

    def load(side: int) -> jax.Array:
        rows = [block_ref[:, head, side].reshape(pages.block_kv, pages.lanes) for head in heads]
        return jnp.stack(rows).astype(pages.compute_dtype)

    keys = load(0)
    return keys, (keys if pages.is_packed else load(1))


def start_softmax(
    sinks: jax.Array,  # [..., rows, 128] f32, times LOG2_E, lanes alike
    lanes: int,
) -> Softmax:
    """Returns the softmax before any key: a sink is a key without a value."""
    lane = lax.broadcasted_iota(jnp.int32, sinks.shape, sinks.ndim - 1)
    total = jnp.where((sinks > MASKED) & (lane == 0), 1.0, 0.0)
    return Softmax(sinks, total, jnp.zeros((*sinks.shape[:-1], lanes), jnp.float32))


def visit(
    state: Softmax,
    q: jax.Array,  # [kv_heads, rows, lanes]
    keys: jax.Array,  # [kv_heads, block_kv, lanes]
    values: jax.Array,  # [kv_heads, block_kv, lanes], zero where unseen
    is_seen: jax.Array,  # [kv_heads, rows, block_kv] bool
    factor: jax.Array,  # [] f32
    soft_cap: float | None,
) -> Softmax:
    """Returns the state after a block of keys.

    A row that has seen no key yet gets weights of 1, which the first key it sees rescales to 0.
    """
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT
    logits = lax.dot_general(
        q,
        keys,
        (((2,), (2,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    logits = logits * factor
    if soft_cap is not None:
        logits = jnp.tanh(logits) * jnp.float32(soft_cap * LOG2_E)
    logits = jnp.where(is_seen, logits, MASKED)
    peak = jnp.maximum(state.peak, logits.max(2, keepdims=True))
    weight = jnp.exp2(logits - _widen(peak, logits.shape[2]))
    kept = jnp.exp2(state.peak - peak)
    total = state.total * kept
    for lane in range(0, logits.shape[2], LANES):
        total = total + weight[:, :, lane : lane + LANES]
    value = lax.dot_general(
        weight.astype(values.dtype),
        values,
        (((2,), (1,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return Softmax(peak, total, state.value * _widen(kept, value.shape[2]) + value)


def finish(state: Softmax, factor: jax.Array) -> jax.Array:  # [..., rows, lanes] f32
    """Returns the mean of the values, times `factor`."""
    total = state.total.sum(state.total.ndim - 1, keepdims=True)
    return state.value * (factor / jnp.maximum(total, 1e-30))


def _widen(
    alike: jax.Array,  # [kv_heads, rows, 128], lanes alike
    width: int,
) -> jax.Array:  # [kv_heads, rows, width]
    return jnp.concatenate([alike] * (width // LANES), axis=2)
