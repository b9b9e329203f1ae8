"""How much the TPU attention kernels visit at once: from shapes, within VMEM and SMEM."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.tpu_pages import LANES, Pages
from pallas_kernels.targets import TpuTarget

_SUBLANES = 8  # VMEM and SMEM keep arrays of several rows in tiles of so many


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBlocks:
    """Sizes of the kernel for sequences of one token."""

    pages: Pages
    rows: int  # sequences to a grid step
    vmem_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileBlocks:
    """Sizes of the kernel for sequences of several tokens."""

    pages: Pages
    block_q: int  # tokens of a tile
    heads: int  # kv heads computed together
    vmem_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteBlocks:
    """Sizes of the kernel that writes the rows of sequences of several tokens."""

    pages: Pages
    heads: int  # kv heads to a grid step
    vmem_bytes: int


_Sized = TypeVar("_Sized", DecodeBlocks, TileBlocks, WriteBlocks)


def decode_blocks(
    pages: Pages, *, group: int, sequences: int, pages_per_sequence: int, target: TpuTarget
) -> DecodeBlocks:
    """Returns the decode kernel's sizes; ValueError where VMEM or SMEM cannot hold the least."""
    rows = min(target.decode_rows, sequences)
    while rows > 1 and _table_bytes(rows + 1, pages_per_sequence) > target.smem_bytes:
        rows //= 2
    _check_smem(_table_bytes(rows + 1, pages_per_sequence), pages_per_sequence, target)
    queries = _tiled_bytes((pages.kv_heads, group, pages.lanes), pages.compute_dtype)
    new = _tiled_bytes((pages.kv_heads, pages.sides, pages.lanes), pages.dtype)
    written = 2 * pages.token_bytes * pages.granule
    block_kv = target.decode_block_numbers // (pages.kv_heads * pages.lanes)
    choices = [
        DecodeBlocks(
            pages=block,
            rows=rows,
            vmem_bytes=2 * block.block_bytes + 2 * rows * (2 * queries + new) + written,
        )
        for block in _blocks(pages, min(block_kv, target.decode_max_block_kv))
    ]
    return _first_that_fits(choices, pages, group, target)


def tile_blocks(
    pages: Pages, *, group: int, tokens: int, pages_per_sequence: int, target: TpuTarget
) -> TileBlocks:
    """Returns the tile kernel's sizes; ValueError where VMEM or SMEM cannot hold the least."""
    # Two tables, each with one row, each double-buffered.
    _check_smem(2 * _table_bytes(1, pages_per_sequence), pages_per_sequence, target)
    least = 16  # tokens: rows that one hardware tile of bfloat16 holds
    most = min(max(target.tile_rows // group, least), 2 * _power_of_two(max(tokens - 1, 1)))
    choices = []
    block_q = max(_power_of_two(most), least)
    while block_q >= least:
        rows = group * block_q
        queries = _tiled_bytes((pages.kv_heads, rows, pages.lanes), pages.compute_dtype)
        state = pages.kv_heads * rows * (2 * LANES + pages.lanes) * 4
        choices += [
            TileBlocks(
                pages=block,
                block_q=block_q,
                heads=_divisor(pages.kv_heads, target.tile_heads),
                vmem_bytes=2 * block.block_bytes + 4 * queries + state,
            )
            for block in _blocks(pages, target.tile_block_kv)
        ]
        block_q //= 2
    return _first_that_fits(choices, pages, group, target)


def write_blocks(pages: Pages, *, target: TpuTarget) -> WriteBlocks:
    """Returns the writing kernel's sizes; ValueError where VMEM cannot hold the least."""
    head = pages.sides * pages.page_size * pages.lanes
    # Twice (one computed, one on its way): a page in, a page out, two blocks of new rows.
    head_bytes = 2 * head * (2 * pages.dtype.itemsize + 2 * pages.compute_dtype.itemsize)
    heads = _divisor(pages.kv_heads, max(target.max_write_bytes // head_bytes, 1))
    choice = WriteBlocks(pages=pages, heads=heads, vmem_bytes=heads * head_bytes)
    return _first_that_fits([choice], pages, 1, target)


def _blocks(pages: Pages, block_kv: int) -> list[Pages]:
    """Returns pages with blocks of about `block_kv` keys and less, whole rows of 128 logits."""
    block_kv = max(_power_of_two(max(block_kv, 1)), LANES, pages.page_size)
    choices = []
    while block_kv >= max(LANES, pages.page_size):
        choices.append(dataclasses.replace(pages, per_block=block_kv // pages.page_size))
        block_kv //= 2
    return choices


def _first_that_fits(
    choices: Sequence[_Sized], pages: Pages, group: int, target: TpuTarget
) -> _Sized:
    """Returns the first choice that VMEM holds; ValueError if it holds not even the last."""
    limit = target.vmem_bytes - target.compiler_vmem_bytes
    for choice in choices:
        if choice.vmem_bytes <= limit:
            return choice
    raise ValueError(
        f"kv_heads={pages.kv_heads} with {group} query heads each, head_dim={pages.head_dim}, "
        f"page_size={pages.page_size}, {pages.dtype} take {choices[-1].vmem_bytes} bytes of VMEM, "
        f"and a kernel has {limit}; shard the heads over more devices"
    )


def _table_bytes(rows: int, pages_per_sequence: int) -> int:
    """Returns what rows of a page table take, with those of the next grid step."""
    return 2 * _tiled_bytes((rows, pages_per_sequence), jnp.dtype(jnp.int32))


def _tiled_bytes(shape: tuple[int, ...], dtype: jnp.dtype) -> int:
    *outer, rows, lanes = shape
    rows = 1 if rows == 1 else -(-rows // _SUBLANES) * _SUBLANES
    size = rows * (-(-lanes // LANES) * LANES) * dtype.itemsize
    for length in outer:
        size *= length
    return size


def _check_smem(table_bytes: int, pages_per_sequence: int, target: TpuTarget) -> None:
    if table_bytes > target.smem_bytes:
        raise ValueError(
            f"{pages_per_sequence=}: a page table takes {table_bytes} bytes of SMEM, and it has "
            f"{target.smem_bytes}; use larger pages"
        )


def _power_of_two(size: int) -> int:
    """Returns the largest power of two that is not above `size`."""
    return 1 << (size.bit_length() - 1)


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor of `number` that is not above `most`."""
    return max(size for size in range(1, min(most, number) + 1) if number % size == 0)
