"""Ragged paged attention on NVIDIA GPUs from Ampere on, in Pallas' Triton.

For GPUs whose matrix instruction is not Hopper's. JAX has deprecated its Triton lowering: all that
knows of it is in this file, and where it is gone `device_refusal` says so. A program holds its
queries in registers and gathers keys by row: pages may be of any size. Work lists, the split of
contexts and the merge are those of the Hopper kernels.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ragged_paged_attention.gpu_blocks import (
    ROWS,
    Blocks,
    DecodeBlocks,
    PrefillBlocks,
)
from pallas_kernels.ragged_paged_attention.gpu_softmax import (
    LOG2E,
    MASKED,
    Softmax,
    finish,
    merge,
    sink_total,
    weigh,
)
from pallas_kernels.ragged_paged_attention.gpu_step import Kernels, attend_step, pages_of
from pallas_kernels.ragged_paged_attention.gpu_work import decode_items, prefill_items, walk_of

try:
    from jax.experimental.pallas import triton
except ImportError:  # `device_refusal` says so
    triton = None  # type: ignore[assignment]

_DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
_MAX_HEAD_DIM = 256
_LEAST_ROWS = 16  # of a product's operand
_MAX_BYTES = 2**31 - 1  # offsets are 64 bits wide only for arrays of 2^32 bytes and more

# By the largest head size they serve. Of a program's shared memory, of which the cards with least
# have 99 KiB, blocks of keys and values take all: `stages - 1` of each. A third stage lets the page
# numbers of a block arrive before its rows are asked for.
_TABLE = {
    64: Blocks(decode=DecodeBlocks(stages=3), prefill=PrefillBlocks(block_kv=64, stages=3)),
    128: Blocks(decode=DecodeBlocks(stages=3), prefill=PrefillBlocks(block_kv=32, stages=3)),
    256: Blocks(
        decode=DecodeBlocks(block_kv=32, stages=3),
        prefill=PrefillBlocks(warpgroups=1, block_kv=32, stages=2),
    ),
}
_PREFILL_WARPS = 8  # however many rows: of 4, each would have too few registers


def page_shapes(
    num_pages: int, *, page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns one layer's keys and values, `[pages, page_size, kv_heads, head_dim]` each.

    Raises ValueError for what the kernels cannot read.
    """
    name = jnp.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"KV dtype {name} is not among {_DTYPES}")
    if head_dim > _MAX_HEAD_DIM:
        raise ValueError(f"{head_dim=} must be at most {_MAX_HEAD_DIM}")
    return pages_of(
        num_pages, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )


def device_refusal(device: jax.Device, dtype: jnp.dtype | None = None) -> str | None:
    """Returns why the kernels cannot run on a device with pages of a type; None if they can."""
    major, _, minor = str(device.compute_capability).partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        return f"the kernels are for NVIDIA GPUs, not for {device.device_kind}"
    capability = (int(major), int(minor))
    if capability < (8, 0):
        return (
            "the kernels multiply bfloat16, which takes compute capability 8.0 (Ampere); "
            f"this is {major}.{minor}"
        )
    if dtype == jnp.float8_e4m3fn and capability < (8, 9):
        return (
            "float8_e4m3fn pages take compute capability 8.9 (Ada); "
            f"this is {major}.{minor}: int8 and float8_e5m2 need no more"
        )
    if triton is None:
        return f"jax {jax.__version__} has no Triton lowering any more"
    return None


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
    if cache[0].dtype.itemsize == 1 and cache[0].size > _MAX_BYTES:
        raise ValueError(
            f"a layer's keys are {cache[0].size} bytes of 8-bit pages; the limit is {_MAX_BYTES}, "
            "as the Triton lowering counts in 32 bits: give fewer num_pages"
        )
    if blocks is None:
        head_dim = cache[0].shape[3]
        blocks = next(sizes for largest, sizes in _TABLE.items() if head_dim <= largest)
    kernels = Kernels(attend_decode, attend_prefill)
    return attend_step(
        kernels,
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


def attend_decode(
    q: jax.Array,  # [sequences, groups, group_size, head_dim], one or more groups of each kv head
    cache: tuple[jax.Array, ...],  # keys, values [pages, page_size, kv_heads, head_dim]
    context: jax.Array,  # [sequences] i32, 0 for none
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    factor: jax.Array,  # [1] f32, makes a product of stored numbers a logit
    sinks: jax.Array,  # [groups, group_size] f32
    *,
    blocks: DecodeBlocks,
    sliding_window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:  # [sequences, groups, group_size, head_dim]
    """Returns attention from each sequence's newest token; zeros without a context."""
    sequences, groups, group_size, head_dim = q.shape
    items, first_item = decode_items(context, blocks, groups, sliding_window)
    partials = _call(
        partial(
            _item_kernel,
            rows=_power_of_two(max(group_size, _LEAST_ROWS)),
            block_kv=blocks.block_kv,
            is_windowed=sliding_window is not None,
            soft_cap=soft_cap,
        ),
        name="paged_attention_decode",
        out_shape=(
            jax.ShapeDtypeStruct((items.shape[0], groups, group_size, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((items.shape[0], groups, 2, group_size), jnp.float32),
        ),
        grid=(items.shape[0], groups),
        num_warps=4,
        num_stages=blocks.stages,
        interpret=interpret,
    )(items, context, page_table, factor, q, *cache)
    return _call(
        partial(_merge_kernel, rows=_power_of_two(group_size)),
        name="paged_attention_merge",
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(sequences, groups),
        num_warps=4,
        num_stages=2,
        interpret=interpret,
    )(first_item, sinks, *partials)


def attend_prefill(
    q: jax.Array,  # [tokens, groups, group_size, head_dim]
    cache: tuple[jax.Array, ...],  # keys, values [pages, page_size, kv_heads, head_dim]
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32
    factor: jax.Array,  # [1] f32, makes a product of stored numbers a logit
    sinks: jax.Array,  # [groups, group_size] f32
    *,
    blocks: PrefillBlocks,
    sliding_window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:  # [tokens, groups, group_size, head_dim]
    """Returns attention from the sequences of several tokens; the rows of others are garbage."""
    tokens, groups, group_size, _ = q.shape
    rows = blocks.warpgroups * ROWS
    items = prefill_items(kv_lens, cu_q_lens, counts, tokens, rows // group_size)
    return _call(
        partial(
            _tile_kernel,
            rows=rows,
            block_kv=blocks.block_kv,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
        ),
        name="paged_attention_prefill",
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(items.shape[0], groups),
        num_warps=_PREFILL_WARPS,
        num_stages=blocks.stages,
        interpret=interpret,
    )(items, page_table, factor, sinks, q, *cache)


def _call(
    kernel: Any,
    *,
    name: str,
    out_shape: Any,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Any:
    """Returns the kernel as a function of arrays, which its programs see whole."""
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name=name,
    )


def _item_kernel(
    # inputs
    items,  # [items, 4] i32
    kv_lens,  # [sequences] i32
    page_table,  # [sequences, pages_per_sequence] i32
    factor,  # [1] f32
    q,  # [sequences, groups, group_size, head_dim]
    keys,  # [pages, page_size, kv_heads, head_dim]
    values,  # [pages, page_size, kv_heads, head_dim]
    # outputs
    partial_values,  # [items, groups, group_size, head_dim] f32
    partial_stats,  # [items, groups, 2, group_size] f32, peak and total
    *,
    rows: int,
    block_kv: int,
    is_windowed: bool,
    soft_cap: float | None,
):
    item, group = pl.program_id(0), pl.program_id(1)
    sequence, begin, end, first = (items[item, column] for column in range(4))
    length, group_size = kv_lens[sequence], q.shape[2]
    head = jnp.arange(rows, dtype=jnp.int32)
    q_rows = _load_rows(q, (sequence, group, head), head < group_size, q.dtype)
    logit_factor = factor[0]
    pages = _Pages(page_table, keys, values, sequence, _kv_head(group, q.shape[1], keys))

    def visit(block, state):
        position = block * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
        is_seen = position < length
        if is_windowed:
            is_seen &= position >= first
        mask = jnp.broadcast_to(is_seen[None, :], (rows, block_kv))
        return _visit(state, q_rows, pages, position, is_seen, mask, logit_factor, soft_cap)

    peak = jnp.full((rows,), MASKED, jnp.float32)
    state = Softmax(peak, jnp.zeros_like(peak), jnp.zeros(q_rows.shape, jnp.float32))
    state = lax.fori_loop(begin, end, visit, state)
    _store_rows(partial_values, (item, group, head), state.value, head < group_size)
    for index, stats in enumerate((state.peak, state.total)):
        place = _at(partial_stats, item, group, index, head)
        triton.store(place, stats, mask=head < group_size)


def _merge_kernel(
    # inputs
    first_item,  # [sequences + 1] i32
    sinks,  # [groups, group_size] f32
    partial_values,  # [items, groups, group_size, head_dim] f32
    partial_stats,  # [items, groups, 2, group_size] f32
    # output
    out,  # [sequences, groups, group_size, head_dim]
    *,
    rows: int,
):
    sequence, group = pl.program_id(0), pl.program_id(1)
    head = jnp.arange(rows, dtype=jnp.int32)
    is_real = head < out.shape[2]

    def add(item, state):
        peak, total = (
            triton.load(_at(partial_stats, item, group, index, head), mask=is_real, other=0.0)
            for index in range(2)
        )
        value = _load_rows(partial_values, (item, group, head), is_real, jnp.float32)
        return merge(state, Softmax(peak, total, value))

    peak = triton.load(_at(sinks, group, head), mask=is_real, other=MASKED) * LOG2E
    width = _power_of_two(out.shape[3])
    state = Softmax(peak, sink_total(peak), jnp.zeros((rows, width), jnp.float32))
    state = lax.fori_loop(first_item[sequence], first_item[sequence + 1], add, state)
    _store_rows(out, (sequence, group, head), finish(state), is_real)


def _tile_kernel(
    # inputs
    items,  # [items, 4] i32
    page_table,  # [sequences, pages_per_sequence] i32
    factor,  # [1] f32
    sinks,  # [groups, group_size] f32
    q,  # [tokens, groups, group_size, head_dim]
    keys,  # [pages, page_size, kv_heads, head_dim]
    values,  # [pages, page_size, kv_heads, head_dim]
    # output
    out,  # [tokens, groups, group_size, head_dim]
    *,
    rows: int,
    block_kv: int,
    sliding_window: int | None,
    soft_cap: float | None,
):
    item, group = pl.program_id(0), pl.program_id(1)
    sequence, first_row, num_tokens, first_position = (items[item, column] for column in range(4))
    group_size = q.shape[2]

    @pl.when(num_tokens > 0)
    def _compute():
        row = jnp.arange(rows, dtype=jnp.int32)
        token, head = lax.div(row, jnp.int32(group_size)), lax.rem(row, jnp.int32(group_size))
        is_real = token < num_tokens
        place = (first_row + token, group, head)
        q_rows = _load_rows(q, place, is_real, q.dtype)
        own_position, logit_factor = first_position + token, factor[0]
        walk = walk_of(first_position, num_tokens, sliding_window, block_kv)
        pages = _Pages(page_table, keys, values, sequence, _kv_head(group, q.shape[1], keys))

        def visit(block, state, *, is_masked):
            position = block * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
            is_written = position < first_position + num_tokens
            mask = None
            if is_masked:
                mask = position[None, :] <= own_position[:, None]
                if sliding_window is not None:
                    mask &= position[None, :] + sliding_window > own_position[:, None]
            return _visit(state, q_rows, pages, position, is_written, mask, logit_factor, soft_cap)

        peak = triton.load(_at(sinks, group, head), mask=is_real, other=MASKED) * LOG2E
        state = Softmax(peak, sink_total(peak), jnp.zeros(q_rows.shape, jnp.float32))
        if sliding_window is not None:
            state = lax.fori_loop(walk.begin, walk.whole, partial(visit, is_masked=True), state)
        state = lax.fori_loop(walk.whole, walk.part, partial(visit, is_masked=False), state)
        state = lax.fori_loop(walk.part, walk.end, partial(visit, is_masked=True), state)
        _store_rows(out, place, finish(state), is_real)


class _Pages(NamedTuple):
    """Where a program's keys and values are."""

    table: Any  # [sequences, pages_per_sequence] i32
    keys: Any  # [pages, page_size, kv_heads, head_dim]
    values: Any  # [pages, page_size, kv_heads, head_dim]
    sequence: jax.Array  # [] i32
    kv_head: jax.Array  # [] i32


def _visit(
    state: Softmax,
    q: jax.Array,  # [rows, width]
    pages: _Pages,
    position: jax.Array,  # [block_kv] i32
    is_loaded: jax.Array,  # [block_kv] bool: the others are zeros, whatever their rows hold
    mask: jax.Array | None,  # [rows, block_kv] bool; None: all are seen
    factor: jax.Array,  # [] f32
    soft_cap: float | None,
) -> Softmax:
    """Returns the state with one more block of keys."""
    page_size = jnp.int32(pages.keys.shape[1])
    entry = _at(pages.table, pages.sequence, lax.div(position, page_size))
    page = triton.load(entry, mask=is_loaded, other=0)
    place = (page, lax.rem(position, page_size), pages.kv_head)
    keys = _load_rows(pages.keys, place, is_loaded, q.dtype)
    logits = jnp.dot(q, keys.T, preferred_element_type=jnp.float32)
    if soft_cap is None:
        logits *= factor * LOG2E
    else:  # tanh, by the function that the device is quick at
        power = jnp.exp2(logits * (factor * (2 * LOG2E / soft_cap)))
        logits = (1 - 2 / (1 + power)) * (soft_cap * LOG2E)
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    state, weight = weigh(state, logits)
    values = _load_rows(pages.values, place, is_loaded, q.dtype)
    product = jnp.dot(weight.astype(q.dtype), values, preferred_element_type=jnp.float32)
    return state._replace(value=state.value + product)


def _kv_head(group: jax.Array, groups: int, keys: Any) -> jax.Array:
    return lax.div(group, jnp.int32(groups // keys.shape[2]))


def _at(ref: Any, *index: Any) -> Any:
    """Returns the places of `ref` at arrays of indices, of which scalars are for all."""
    return ref.at[tuple(jnp.broadcast_arrays(*index))]


def _rows_of(
    ref: Any,  # [..., width]
    place: tuple[Any, ...],  # of each row: an index or [rows] i32 for every axis but the last
    is_real: jax.Array,  # [rows] bool
) -> tuple[Any, jax.Array]:
    """Returns the places of rows, and which numbers are real, `[rows, width]` both.

    The width is a power of two: columns that pad it are not real.
    """
    width = ref.shape[-1]
    column = jnp.arange(_power_of_two(width), dtype=jnp.int32)[None, :]
    is_number = jnp.broadcast_to(is_real[:, None], (*is_real.shape, column.shape[1]))
    if column.shape[1] > width:
        is_number &= column < width
    index = (axis[:, None] if jnp.ndim(axis) else axis for axis in place)
    return _at(ref, *index, column), is_number


def _load_rows(
    ref: Any,  # [..., width]
    place: tuple[Any, ...],  # of each row, as `_rows_of` takes it
    is_real: jax.Array,  # [rows] bool
    dtype: jnp.dtype,
) -> jax.Array:  # [rows, width], padded
    """Returns rows from anywhere; zeros for those that are not real, and for the padding."""
    numbers, mask = _rows_of(ref, place, is_real)
    if not jnp.issubdtype(ref.dtype, jnp.floating) or ref.dtype.itemsize > 1:
        return triton.load(numbers, mask=mask, other=0).astype(dtype)
    # The lowering knows no float8 of zero.
    return jnp.where(mask, triton.load(numbers, mask=mask).astype(dtype), jnp.zeros((), dtype))


def _store_rows(
    ref: Any,  # [..., width]
    place: tuple[Any, ...],  # of each row, as `_rows_of` takes it
    rows: jax.Array,  # [rows, width], padded
    is_real: jax.Array,  # [rows] bool
) -> None:
    """Stores the real rows."""
    numbers, mask = _rows_of(ref, place, is_real)
    triton.store(numbers, rows.astype(ref.dtype), mask=mask)


def _power_of_two(size: int) -> int:
    """Returns the least power of two that holds `size`: what the lowering takes as a dimension."""
    return 1 << (size - 1).bit_length()
