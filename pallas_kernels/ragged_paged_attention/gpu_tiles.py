"""What the GPU kernels do with one tile of queries and one block of keys, inside a kernel.

Everything here is called with Refs and traced values of a Mosaic GPU kernel. A warpgroup holds 64
rows of queries, the least that Hopper's matrix instruction takes. Matrix products are `jnp.dot`
under interpretation, which knows no tensor cores; all else is the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention.gpu_blocks import RAW_STAGES, ROWS
from pallas_kernels.ragged_paged_attention.gpu_compat import load_unswizzled, transposed
from pallas_kernels.ragged_paged_attention.gpu_softmax import LOG2E, Softmax, weigh


def swizzle_of(head_dim: int, dtype: Any) -> int:
    """Returns the bytes over which a row of a tile is swizzled: the most that divide it."""
    row_bytes = head_dim * jnp.dtype(dtype).itemsize
    return next(size for size in (128, 64, 32) if row_bytes % size == 0)


def tile(rows: int, head_dim: int, dtype: Any, *, copies: int) -> Any:
    """Returns `[copies, rows, head_dim]` of shared memory, swizzled as matrix operands must be."""
    swizzle = swizzle_of(head_dim, dtype)
    transforms = (
        plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM((copies, rows, head_dim), dtype, transforms=transforms)


def spread(value: jax.Array, interpret: bool) -> jax.Array:  # [ROWS] or [ROWS, columns]
    """Returns the value laid over the warpgroup's registers as wgmma leaves its results."""
    if interpret:
        return value
    layout = plgpu.Layout.WGMMA
    return plgpu.layout_cast(value, layout if value.ndim == 2 else layout.reduce(1))


def read_unswizzled(tile, interpret: bool) -> jax.Array:  # [ROWS, columns]
    """Returns a tile that rows were copied to from anywhere, laid out as `spread` does."""
    return tile[...] if interpret else load_unswizzled(tile, plgpu.Layout.WGMMA)


def count(shape: tuple[int, int], axis: int, interpret: bool) -> jax.Array:
    """Returns the index along an axis, laid out as `spread` does."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def start(peak: jax.Array, total: jax.Array, head_dim: int, interpret: bool) -> Softmax:
    """Returns the softmax before any key."""
    value = jnp.zeros((ROWS, head_dim), jnp.float32)
    return Softmax(*(spread(part, interpret) for part in (peak, total, value)))


def logits_of(
    q_tile,  # [ROWS, head_dim]
    k_tile,  # [block_kv, head_dim]
    factor: jax.Array,  # [] f32, makes a product of stored numbers a logit
    soft_cap: float | None,
    interpret: bool,
) -> jax.Array:  # [ROWS, block_kv] f32, times log2(e)
    """Returns the capped logits of a block, in the base that `exp2` wants."""
    if interpret:
        product = jnp.dot(q_tile[...], k_tile[...].T, preferred_element_type=jnp.float32)
    else:

        def multiply(accumulator):
            plgpu.wgmma(accumulator, q_tile, transposed(k_tile))
            return accumulator[...]

        shape = (q_tile.shape[0], k_tile.shape[0])
        product = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    if soft_cap is None:
        return product * (factor * LOG2E)
    return jnp.tanh(product * (factor / soft_cap)) * (soft_cap * LOG2E)


def add_values(
    state: Softmax,
    weight: jax.Array,  # [ROWS, block_kv]
    v_tile,  # [block_kv, head_dim]
    interpret: bool,
) -> Softmax:
    """Returns the state with the block's weighted values."""
    if interpret:
        product = jnp.dot(weight, v_tile[...], preferred_element_type=jnp.float32)
        return state._replace(value=state.value + product)

    def multiply(accumulator):
        plgpu.wgmma(accumulator, weight, v_tile)

    return state._replace(value=pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(state.value)))


class Context(NamedTuple):
    """The keys that a tile's queries see, in one sequence and one kv head."""

    sequence: jax.Array  # [] i32, row of the page table
    kv_head: jax.Array  # [] i32
    first: jax.Array  # [] i32, first position that any query sees
    length: jax.Array  # [] i32, positions that hold a key


class Pages(NamedTuple):
    """Where keys and values are, in GPU memory."""

    table: Any  # [sequences, pages_per_sequence] i32
    page_size: int
    keys: Any  # [parts, part_size, kv_heads, head_dim]
    values: Any  # [parts, part_size, kv_heads, head_dim]


class Ring(NamedTuple):
    """Blocks of keys or values in shared memory, some being read while others arrive."""

    tiles: Any  # [stages, block_kv, head_dim]
    full: Any  # [stages] barriers: a block has arrived
    free: Any  # [stages] barriers: a block has been read, and another will follow
    raw: Any  # [1 or RAW_STAGES] barriers: a block has arrived that is not yet what is to be read
    raw_tiles: Any = None  # [RAW_STAGES, block_kv, head_dim], of 8-bit pages


class Stream(NamedTuple):
    """Blocks `[begin, end)` of a context on their way through shared memory."""

    keys: Ring
    values: Ring
    begin: jax.Array  # [] i32
    end: jax.Array  # [] i32

    def slot(self, block: jax.Array) -> jax.Array:
        """Returns the place of a block in the rings."""
        return lax.rem(block - self.begin, jnp.int32(self.keys.tiles.shape[0]))


def ring_types(
    head_dim: int,
    dtype: Any,
    pages: jax.Array,  # [pages, page_size, kv_heads, head_dim]
    block_kv: int,
    stages: int,
    *,
    readers: int,
) -> dict[str, Any]:
    """Returns the scratch of the rings of keys and values; `readers` warpgroups free a block."""
    copies = max(1, block_kv // pages.shape[1])
    is_narrow = pages.dtype.itemsize == 1

    def ring() -> Ring:
        return Ring(
            tiles=tile(block_kv, head_dim, dtype, copies=stages),
            full=plgpu.Barrier(num_arrivals=1 if is_narrow else copies, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
            raw=plgpu.Barrier(num_arrivals=copies, num_barriers=RAW_STAGES if is_narrow else 1),
            raw_tiles=plgpu.SMEM((RAW_STAGES, block_kv, head_dim), pages.dtype)
            if is_narrow
            else None,
        )

    return {"key_ring": ring(), "value_ring": ring()}


def visit(
    block: jax.Array,  # [] i32
    state: Softmax,
    stream: Stream,
    q_tile,  # [ROWS, head_dim]
    factor: jax.Array,  # [] f32, makes a product of stored numbers a logit
    soft_cap: float | None,
    mask: Callable[[jax.Array, jax.Array], jax.Array] | None,  # of logits and block
    interpret: bool,
) -> Softmax:
    """Returns the state with one more block of the stream, and frees its place in the rings."""
    slot = stream.slot(block)
    plgpu.barrier_wait(stream.keys.full.at[slot])
    logits = logits_of(q_tile, stream.keys.tiles.at[slot], factor, soft_cap, interpret)
    _free(stream.keys, block, stream)
    if mask is not None:
        logits = mask(logits, block)
    state, weight = weigh(state, logits)
    # Without this barrier the compiler keeps the weights as float32 too, and spills.
    state, weight = lax.optimization_barrier((state, weight.astype(q_tile.dtype)))
    plgpu.barrier_wait(stream.values.full.at[slot])
    state = add_values(state, weight, stream.values.tiles.at[slot], interpret)
    _free(stream.values, block, stream)
    return state


def _free(ring: Ring, block: jax.Array, stream: Stream) -> None:
    # An arrival that nobody waits for would be left over when the kernel ends.
    @pl.when(block + ring.tiles.shape[0] < stream.end)
    def _arrive():
        plgpu.barrier_arrive(ring.free.at[stream.slot(block)])


def _wait_until_free(ring: Ring, block: jax.Array, stream: Stream) -> None:
    @pl.when(block - stream.begin >= ring.tiles.shape[0])
    def _wait():
        plgpu.barrier_wait(ring.free.at[stream.slot(block)])


def load_blocks(stream: Stream, pages: Pages, context: Context, interpret: bool) -> None:
    """Fills the rings with the blocks of the stream; run by a warpgroup of its own.

    A row that was never written may hold anything, NaN included, and 0 * NaN is NaN: values that
    no query sees are cleared, which only the outermost blocks have.
    """
    if stream.keys.raw_tiles is None:
        load = partial(_load_block, stream, pages, context, interpret)
    else:
        _start_narrow_block(stream.begin, stream, pages, context)
        load = partial(_load_narrow_block, stream, pages, context, interpret)

    def step(block, _):
        load(block)
        return ()

    lax.fori_loop(stream.begin, stream.end, step, ())


def _load_block(
    stream: Stream, pages: Pages, context: Context, interpret: bool, block: jax.Array
) -> None:
    """Copies a block straight to its place, where it is to be read as it is stored."""
    slot, ring = stream.slot(block), stream.values
    block_kv = ring.tiles.shape[1]
    ids = page_ids(pages, context, block, block_kv)
    _wait_until_free(stream.keys, block, stream)
    copy_parts(pages.keys, ids, context, stream.keys.tiles.at[slot], stream.keys.full.at[slot])
    _wait_until_free(ring, block, stream)
    first = block * block_kv
    is_edge = (first < context.first) | (first + block_kv > context.length)

    @pl.when(jnp.logical_not(is_edge))
    def _copy():
        copy_parts(pages.values, ids, context, ring.tiles.at[slot], ring.full.at[slot])

    @pl.when(is_edge)
    def _copy_and_clear():
        copy_parts(pages.values, ids, context, ring.tiles.at[slot], ring.raw.at[0])
        plgpu.barrier_wait(ring.raw.at[0])
        tile = ring.tiles.at[slot]
        convert_rows(tile, tile, _is_seen(first, context), interpret)
        plgpu.commit_smem()
        for _ in ids:  # as many as the copies would have sent
            plgpu.barrier_arrive(ring.full.at[slot])


def _start_narrow_block(block: jax.Array, stream: Stream, pages: Pages, context: Context) -> None:
    """Starts the copies of a block of 8-bit pages."""
    ids = page_ids(pages, context, block, stream.keys.tiles.shape[1])
    raw_slot = lax.rem(block - stream.begin, jnp.int32(RAW_STAGES))
    for stored, ring in ((pages.keys, stream.keys), (pages.values, stream.values)):
        copy_parts(stored, ids, context, ring.raw_tiles.at[raw_slot], ring.raw.at[raw_slot])


def _load_narrow_block(
    stream: Stream, pages: Pages, context: Context, interpret: bool, block: jax.Array
) -> None:
    """Starts the next block, and converts this one to what the matrix instruction multiplies."""

    @pl.when(block + 1 < stream.end)
    def _start_next():
        _start_narrow_block(block + 1, stream, pages, context)

    slot = stream.slot(block)
    raw_slot = lax.rem(block - stream.begin, jnp.int32(RAW_STAGES))
    is_seen = _is_seen(block * stream.keys.tiles.shape[1], context)
    for ring, keep in ((stream.keys, None), (stream.values, is_seen)):
        plgpu.barrier_wait(ring.raw.at[raw_slot])
        _wait_until_free(ring, block, stream)
        convert_rows(ring.raw_tiles.at[raw_slot], ring.tiles.at[slot], keep, interpret)
        plgpu.commit_smem()
        plgpu.barrier_arrive(ring.full.at[slot])


def _is_seen(first: jax.Array, context: Context) -> Callable[[jax.Array], jax.Array]:
    """Returns a function of rows of a block: whether any query sees their positions."""

    def is_seen(row: jax.Array) -> jax.Array:
        return (row >= context.first - first) & (row < context.length - first)

    return is_seen


def convert_rows(
    source,  # [rows, head_dim], shared memory
    target,  # [rows, head_dim], shared memory; may be the source
    keep: Callable[[jax.Array], jax.Array] | None,  # of row numbers; the others become zeros
    interpret: bool,
) -> None:
    """Copies a tile, converted to the type of the target."""
    rows, head_dim = source.shape
    # A few columns at once: a loader has few registers.
    width = swizzle_of(head_dim, target.dtype) // target.dtype.itemsize
    for first in range(0, rows, ROWS):
        if keep is not None:
            is_kept = keep(count((ROWS, width), 0, interpret) + first)
        for column in range(0, head_dim, width):
            part = (pl.ds(first, ROWS), pl.ds(column, width))
            values = source.at[part][...]
            if source.dtype != target.dtype:
                values = values.astype(jnp.float32).astype(target.dtype)
            values = spread(values, interpret)
            if keep is not None:
                values = jnp.where(is_kept, values, jnp.zeros_like(values))
            target.at[part][...] = values


def page_ids(
    pages: Pages,
    context: Context,
    block: jax.Array,  # [] i32
    block_kv: int,
) -> list[jax.Array]:
    """Returns where the parts of a block of keys are, in `parts_of_pages`."""
    # The last block may reach past the pages that the sequence has.
    last = lax.div(context.length - 1, jnp.int32(pages.page_size))
    size = min(pages.page_size, block_kv)
    ids = []
    for part in range(block_kv // size):
        position = block * block_kv + part * size
        index = jnp.minimum(lax.div(position, jnp.int32(pages.page_size)), last)
        page = pages.table[context.sequence, index]
        if pages.page_size > size:
            page = page * (pages.page_size // size)
            page += lax.div(lax.rem(position, jnp.int32(pages.page_size)), jnp.int32(size))
        ids.append(page)
    return ids


def parts_of_pages(
    pages: jax.Array,  # [pages, page_size, kv_heads, head_dim]
    block_kv: int,
) -> jax.Array:  # [parts, part_size, kv_heads, head_dim]
    """Returns the pages cut in parts that fit a block of keys: what one copy moves."""
    return pages.reshape(-1, min(pages.shape[1], block_kv), *pages.shape[2:])


def copy_parts(
    stored,  # [parts, part_size, kv_heads, head_dim]
    ids: list[jax.Array],
    context: Context,
    tile,  # [block_kv, head_dim], shared memory
    barrier,
) -> None:
    """Starts the copies of a block of keys or values; each arrives at the barrier."""
    size = stored.shape[1]
    for index, part in enumerate(ids):
        target = tile.at[pl.ds(index * size, size)]
        plgpu.copy_gmem_to_smem(stored.at[part, :, context.kv_head], target, barrier)
