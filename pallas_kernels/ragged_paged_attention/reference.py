"""Ragged paged attention in plain XLA: any device, and the CPU's own path.

Its cost follows the longest context in the batch, not the page table's width: keys are visited in
blocks, and the number of blocks is data.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.rows import cache_rows, to_stored

_DTYPES = tuple(
    jnp.dtype(name) for name in ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
)
_MASKED = -1e30  # finite: the difference of two is 0, not NaN
_GROUP = 8  # sequences whose keys stay in a core's cache from the gather to the product,
_MAX_GROUPS = 4  # in so many groups at most: the program holds each, in each layer


def stored_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the type that pages are kept in: 16-bit floats as their bits.

    XLA's CPU backend has no bfloat16 scatter: it would convert the whole cache to float32 and back
    on every write. ValueError for a type that `value_dtype` does not know.
    """
    if dtype not in _DTYPES:
        names = ", ".join(known.name for known in _DTYPES)
        raise ValueError(f"KV pages cannot be {jnp.dtype(dtype).name}; they can be {names}")
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else jnp.dtype(dtype)


def page_shapes(
    num_pages: int, *, page_size: int, kv_heads: int, head_dim: int, dtype: jnp.dtype
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns one layer's keys and values, `[pages, page_size, kv_heads * head_dim]` each.

    Heads lie side by side in a row, so that a sequence's rows are one matrix operand as they are;
    splitting them would cost a transposed copy on every read.
    """
    shape = (num_pages, page_size, kv_heads * head_dim)
    pages = jax.ShapeDtypeStruct(shape, stored_dtype(dtype))
    return (pages, pages)


def device_refusal(device: jax.Device, dtype: jnp.dtype | None = None) -> str | None:
    """Returns None: plain XLA runs anywhere."""
    del device, dtype
    return None


def value_dtype(stored: jnp.dtype) -> jnp.dtype:
    """Returns the type that pages of type `stored` are multiplied in.

    bfloat16 holds every int8 and every 8-bit float exactly.
    """
    return jnp.dtype(jnp.float32) if stored == jnp.float32 else jnp.dtype(jnp.bfloat16)


def _from_stored(rows: jax.Array) -> jax.Array:
    """Returns gathered rows of pages in their `value_dtype`."""
    if rows.dtype.itemsize > 1:
        return lax.bitcast_convert_type(rows, value_dtype(rows.dtype))
    # Without the barrier the conversion would move into the product, element by element.
    return lax.optimization_barrier(rows.astype(jnp.bfloat16))


def _bits(
    rows: jax.Array,  # [tokens, kv_heads, head_dim]
    scale: jax.Array | None,  # [] f32
    stored: jnp.dtype,  # of pages
) -> jax.Array:  # [tokens, kv_heads, head_dim], of the type `stored`
    dtype = value_dtype(stored) if stored.itemsize > 1 else stored
    return lax.bitcast_convert_type(to_stored(rows, scale, dtype), stored)


class _Softmax(NamedTuple):
    """The running state of a softmax over blocks of keys (https://arxiv.org/abs/1805.02867)."""

    peak: jax.Array  # [..., rows] f32, largest logit so far
    total: jax.Array  # [..., rows] f32, sum of exp(logit - peak)
    value: jax.Array  # [..., rows, width] f32, the same sum weighted by values


class _Rules(NamedTuple):
    """What changes a logit besides the keys."""

    sliding_window: int | None
    soft_cap: float | None
    sinks: jax.Array  # [heads] f32


def attend(
    q: jax.Array,  # [tokens, heads, head_dim]
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    cache: tuple[jax.Array, ...],  # keys, values [pages, page_size, kv_heads * head_dim]
    kv_lens: jax.Array,  # [sequences] i32
    page_table: jax.Array,  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array,  # [sequences + 1] i32
    counts: jax.Array,  # [2] i32: one-token sequences, all sequences
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # [heads] f32
    k_scale: jax.Array | None = None,  # [] f32
    v_scale: jax.Array | None = None,  # [] f32
    block_q: int = 128,  # rows of a tile, and keys it visits at once
    block_kv: int = 256,  # keys that one-token sequences visit at once
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Returns the attention of `api.ragged_paged_attention` and the cache with the new rows."""
    tokens, heads, head_dim = q.shape
    sequences = kv_lens.shape[0]
    # Scaling queries and outputs is cheaper than scaling every stored key and value.
    q_scale = jnp.float32(scale) if k_scale is None else jnp.float32(scale) * k_scale
    q = q.astype(jnp.float32) * q_scale
    num_pages, page_size, _ = cache[0].shape
    row = cache_rows(
        kv_lens,
        page_table,
        cu_q_lens,
        counts,
        tokens=tokens,
        num_pages=num_pages,
        page_size=page_size,
    )
    new = ((k, k_scale), (v, v_scale))
    cache = tuple(
        _write(pages, row, _bits(rows, side_scale, pages.dtype))
        for pages, (rows, side_scale) in zip(cache, new, strict=True)
    )

    no_sinks = jnp.full((heads,), _MASKED, jnp.float32)
    rules = _Rules(sliding_window, soft_cap, no_sinks if sinks is None else sinks)
    # In a batch with prefills the decodes take little of the time: one group compiles faster.
    group = max(_GROUP, -(-sequences // _MAX_GROUPS)) if sequences == tokens else sequences
    out = _attend_one(q[:sequences], cache, kv_lens, page_table, counts, rules, block_kv, group)
    if sequences < tokens:  # else every sequence has one token
        rows = jnp.zeros((tokens + block_q, heads, head_dim), jnp.float32)
        rows = lax.dynamic_update_slice(rows, out, (0, 0, 0))
        q = jnp.pad(q, ((0, block_q), (0, 0), (0, 0)))
        out = _attend_tiles(rows, q, cache, kv_lens, page_table, cu_q_lens, counts, rules, block_q)[
            :tokens
        ]
    return (out if v_scale is None else out * v_scale), cache


def _write(
    pages: jax.Array,  # [pages, page_size, kv_heads * head_dim]
    row: jax.Array,  # [tokens] i32, of the flat cache
    rows: jax.Array,  # [tokens, kv_heads, head_dim], as stored
) -> jax.Array:
    """Returns the pages with the rows in place; padding tokens write nowhere."""
    num_pages, page_size, width = pages.shape
    flat, rows = pages.reshape(num_pages * page_size, width), rows.reshape(-1, width)
    if pages.dtype.itemsize == 1:  # as with bfloat16, only bits are written in place
        flat = lax.bitcast_convert_type(flat, jnp.uint8)
        rows = lax.bitcast_convert_type(rows, jnp.uint8)
    flat = flat.at[row].set(rows, mode="drop")
    return lax.bitcast_convert_type(flat, pages.dtype).reshape(pages.shape)


def _attend_one(
    q: jax.Array,  # [sequences, heads, head_dim] f32, scaled
    cache: tuple[jax.Array, ...],
    kv_lens: jax.Array,
    page_table: jax.Array,
    counts: jax.Array,
    rules: _Rules,
    block_kv: int,
    group: int,  # sequences whose keys are gathered and multiplied together
) -> jax.Array:  # [sequences, heads, head_dim] f32
    """Attends from the newest token of each of the first `counts[0]` sequences."""
    sequences, heads, head_dim = q.shape
    _, page_size, width = cache[0].shape
    dtype = value_dtype(cache[0].dtype)
    wide = _block_diagonal(q, width // head_dim).astype(dtype)
    context = jnp.where(jnp.arange(sequences) < counts[0], kv_lens, 0)
    ids_per_block, page_table = _split_pages(page_table, page_size, block_kv)
    groups = [slice(first, first + group) for first in range(0, sequences, group)]

    def visit(block: jax.Array, states: tuple[_Softmax, ...]) -> tuple[_Softmax, ...]:
        ids = lax.dynamic_slice_in_dim(page_table, block * ids_per_block, ids_per_block, 1)
        position = block * (ids_per_block * page_size)
        return tuple(
            _visit_one(state, wide[rows], cache, ids[rows], position, context[rows], rules)
            for state, rows in zip(states, groups, strict=True)
        )

    start = jnp.int32(0)
    if rules.sliding_window is not None:
        oldest = jnp.where(context > 0, context - rules.sliding_window, jnp.iinfo(jnp.int32).max)
        start = jnp.maximum(oldest.min(), 0) // (ids_per_block * page_size)
    end = _cdiv(context.max(), ids_per_block * page_size)
    states = tuple(_start(rules.sinks, q[rows].shape[:2], head_dim) for rows in groups)
    states = lax.fori_loop(start, end, visit, states)
    return jnp.concatenate([_finish(state) for state in states])


def _visit_one(
    state: _Softmax,
    wide: jax.Array,  # [rows, heads, width], block-diagonal queries
    cache: tuple[jax.Array, ...],
    ids: jax.Array,  # [rows, ids_per_block] i32, pages of this block of keys
    first_position: jax.Array,  # [] i32, of the block
    context: jax.Array,  # [rows] i32, 0 for padding
    rules: _Rules,
) -> _Softmax:
    rows, heads, width = wide.shape
    keys, values = (pages[ids].reshape(rows, -1, width) for pages in cache)
    position = first_position + jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :]
    is_seen = position < context[:, None]
    if rules.sliding_window is not None:
        is_seen &= position >= context[:, None] - rules.sliding_window
    # A row that was never written may hold anything, NaN included, and 0 * NaN is NaN.
    values = jnp.where(is_seen[:, :, None], values, jnp.zeros((), values.dtype))
    # The big operand first and contracted on its last axis: XLA's CPU backend multiplies that
    # without repacking it, if the barrier keeps the transposition out of the product.
    logits = jnp.einsum(
        "scx,shx->sch",
        _from_stored(keys),
        wide,
        preferred_element_type=jnp.float32,
    )
    logits = lax.optimization_barrier(logits).swapaxes(1, 2)
    state, weight = _visit(state, _cap(logits, rules.soft_cap), is_seen[:, None, :])
    value = jnp.einsum(
        "shc,scx->shx",
        weight.astype(wide.dtype),
        _from_stored(values),
        preferred_element_type=jnp.float32,
    )
    return state._replace(value=state.value + _own_blocks(value, state.value.shape[2]))


def _block_diagonal(
    q: jax.Array,  # [sequences, heads, head_dim]
    kv_heads: int,
) -> jax.Array:  # [sequences, heads, kv_heads * head_dim]
    """Puts each query into the columns of its kv head, zeros elsewhere.

    A sequence's keys are then one matrix as they lie in the cache. The zeros cost multiplications,
    which are free here: reading the keys is what takes time.
    """
    sequences, heads, head_dim = q.shape
    q = q.reshape(sequences, kv_heads, heads // kv_heads, 1, head_dim)
    own = jnp.eye(kv_heads, dtype=jnp.bool_)[None, :, None, :, None]
    return jnp.where(own, q, jnp.zeros((), q.dtype)).reshape(sequences, heads, -1)


def _own_blocks(
    wide: jax.Array,  # [rows, heads, kv_heads * head_dim]
    head_dim: int,
) -> jax.Array:  # [rows, heads, head_dim]
    """Returns each head's columns of its kv head."""
    rows, heads, width = wide.shape
    kv_heads = width // head_dim
    blocks = wide.reshape(rows, kv_heads, heads // kv_heads, kv_heads, head_dim)
    own = jnp.eye(kv_heads, dtype=jnp.bool_)[None, :, None, :, None]
    return jnp.where(own, blocks, 0.0).sum(3).reshape(rows, heads, head_dim)


def _attend_tiles(
    out: jax.Array,  # [tokens + block_q, heads, head_dim] f32, rows to overwrite
    q: jax.Array,  # [tokens + block_q, heads, head_dim] f32, scaled
    cache: tuple[jax.Array, ...],
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    counts: jax.Array,
    rules: _Rules,
    block_q: int,
) -> jax.Array:
    """Attends from the sequences of several tokens, `block_q` rows of one sequence at a time.

    A tile's rows past its sequence are garbage until the next tile, which starts there, writes
    them: tiles go upwards.
    """
    sequence = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    q_lens = cu_q_lens[1:] - cu_q_lens[:-1]
    is_tiled = (sequence >= counts[0]) & (sequence < counts[1])
    num_tiles = jnp.where(is_tiled, _cdiv(q_lens, block_q), 0)
    tile_ends = jnp.cumsum(num_tiles, dtype=jnp.int32)
    ids_per_block, page_table = _split_pages(page_table, cache[0].shape[1], block_q)

    def visit(tile: jax.Array, out: jax.Array) -> jax.Array:
        owner = (tile_ends <= tile).sum(dtype=jnp.int32)
        offset = (tile - tile_ends[owner] + num_tiles[owner]) * block_q
        row = cu_q_lens[owner] + offset
        rows = lax.dynamic_slice_in_dim(q, row, block_q, 0)
        position = kv_lens[owner] - q_lens[owner] + offset
        rows = _attend_tile(
            rows, cache, page_table[owner], position, kv_lens[owner], rules, ids_per_block
        )
        return lax.dynamic_update_slice_in_dim(out, rows, row, 0)

    return lax.fori_loop(0, tile_ends[-1], visit, out)


def _attend_tile(
    q: jax.Array,  # [block_q, heads, head_dim] f32, scaled
    cache: tuple[jax.Array, ...],
    page_ids: jax.Array,  # [pages_per_sequence] i32
    first_position: jax.Array,  # [] i32, of the tile's first row
    kv_len: jax.Array,  # [] i32
    rules: _Rules,
    ids_per_block: int,
) -> jax.Array:  # [block_q, heads, head_dim] f32
    block_q, heads, head_dim = q.shape
    _, page_size, width = cache[0].shape
    kv_heads = width // head_dim
    block_kv = ids_per_block * page_size
    rows = q.reshape(block_q, kv_heads, heads // kv_heads, head_dim)
    rows = rows.transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
    rows = rows.astype(value_dtype(cache[0].dtype))
    query_position = first_position + jnp.arange(block_q, dtype=jnp.int32)
    query_position = jnp.tile(query_position, heads // kv_heads)

    def visit(block: jax.Array, state: _Softmax) -> _Softmax:
        ids = lax.dynamic_slice_in_dim(page_ids, block * ids_per_block, ids_per_block, 0)
        keys, values = (pages[ids].reshape(block_kv, kv_heads, head_dim) for pages in cache)
        position = block * block_kv + jnp.arange(block_kv, dtype=jnp.int32)
        is_written = (position < kv_len)[:, None, None]
        values = jnp.where(is_written, values, jnp.zeros((), values.dtype))
        return _visit_many(state, rows, keys, values, query_position, position, rules)

    sinks = jnp.repeat(rules.sinks.reshape(kv_heads, -1), block_q, axis=1)
    state = _start(sinks, rows.shape[:2], head_dim)
    first = jnp.int32(0)
    if rules.sliding_window is not None:
        first = jnp.maximum(first_position + 1 - rules.sliding_window, 0) // block_kv
    last = _cdiv(jnp.minimum(kv_len, first_position + block_q), block_kv)
    value = _finish(lax.fori_loop(first, last, visit, state))
    value = value.reshape(kv_heads, heads // kv_heads, block_q, head_dim)
    return value.transpose(2, 0, 1, 3).reshape(block_q, heads, head_dim)


def _visit_many(
    state: _Softmax,
    rows: jax.Array,  # [kv_heads, rows, head_dim]
    keys: jax.Array,  # [block_kv, kv_heads, head_dim], as stored
    values: jax.Array,  # [block_kv, kv_heads, head_dim], as stored
    query_position: jax.Array,  # [rows] i32
    position: jax.Array,  # [block_kv] i32
    rules: _Rules,
) -> _Softmax:
    logits = jnp.einsum(
        "kqd,ckd->kqc",
        rows,
        _from_stored(keys),
        preferred_element_type=jnp.float32,
    )
    is_seen = position[None, :] <= query_position[:, None]
    if rules.sliding_window is not None:
        is_seen &= position[None, :] > query_position[:, None] - rules.sliding_window
    state, weight = _visit(state, _cap(logits, rules.soft_cap), is_seen[None])
    value = jnp.einsum(
        "kqc,ckd->kqd",
        weight.astype(rows.dtype),
        _from_stored(values),
        preferred_element_type=jnp.float32,
    )
    return state._replace(value=state.value + value)


def _split_pages(
    page_table: jax.Array,  # [..., pages_per_sequence] i32
    page_size: int,
    block_kv: int,
) -> tuple[int, jax.Array]:
    """Returns how many pages make a block, and the table padded to whole blocks."""
    ids_per_block = min(max(1, block_kv // page_size), page_table.shape[-1])
    return ids_per_block, jnp.pad(page_table, ((0, 0), (0, -page_table.shape[-1] % ids_per_block)))


def _visit(
    state: _Softmax,
    logits: jax.Array,  # [..., rows, keys] f32
    is_seen: jax.Array,  # [..., rows or 1, keys] bool
) -> tuple[_Softmax, jax.Array]:
    """Returns the state rescaled for a block of keys (their values still to add), and weights.

    A row that has seen no key yet gets weights of 1, which the first key it sees rescales to 0.
    """
    logits = jnp.where(is_seen, logits, _MASKED)
    peak = jnp.maximum(state.peak, logits.max(-1))
    weight = jnp.exp(logits - peak[..., None])
    kept = jnp.exp(state.peak - peak)
    total = state.total * kept + weight.sum(-1)
    return _Softmax(peak, total, state.value * kept[..., None]), weight


def _start(sinks: jax.Array, rows: tuple[int, ...], width: int) -> _Softmax:
    """Returns the softmax before any key: a sink is a key without a value."""
    peak = jnp.broadcast_to(sinks.reshape((1,) * (len(rows) - sinks.ndim) + sinks.shape), rows)
    total = jnp.where(peak > _MASKED, 1.0, 0.0)
    return _Softmax(peak, total, jnp.zeros((*rows, width), jnp.float32))


def _finish(state: _Softmax) -> jax.Array:
    return state.value / jnp.maximum(state.total, 1e-30)[..., None]


def _cap(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _cdiv(a: jax.Array, b: int) -> jax.Array:
    return (a + (b - 1)) // b
