"""How many rows and keys the GPU kernels take at once, and what that costs in shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

ROWS = 64  # of queries in a warpgroup's tile: M of wgmma
RAW_STAGES = 2  # blocks of 8-bit pages that arrive while another is converted


@dataclass(frozen=True, kw_only=True)
class DecodeBlocks:
    """Sizes of the kernel for sequences of one token."""

    block_kv: int = 64  # keys visited at once
    stages: int = 2  # blocks of keys in shared memory
    programs: int = 2 * 2 * 132  # that fill the device: programs an SM, waves of them, SMs
    min_split: int = 4  # blocks that are worth a program


@dataclass(frozen=True, kw_only=True)
class PrefillBlocks:
    """Sizes of the kernel for sequences of several tokens."""

    warpgroups: int = 2  # that compute, 64 rows each
    block_kv: int = 128
    stages: int = 2


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of both kernels."""

    decode: DecodeBlocks = DecodeBlocks()
    prefill: PrefillBlocks = PrefillBlocks()


# By the largest head size they serve. Registers bound the blocks: of a thread's, the accumulator
# takes head_dim / 2 and the logits block_kv / 2. Shared memory bounds the stages: two decode
# programs share an SM's, but for head sizes above 128.
_TABLE = {
    64: Blocks(decode=DecodeBlocks(stages=4), prefill=PrefillBlocks(stages=3)),
    80: Blocks(decode=DecodeBlocks(stages=3), prefill=PrefillBlocks(stages=3)),
    128: Blocks(decode=DecodeBlocks(stages=2), prefill=PrefillBlocks(stages=2)),
    256: Blocks(
        decode=DecodeBlocks(programs=2 * 132),
        prefill=PrefillBlocks(warpgroups=1, block_kv=64),
    ),
}
# 8-bit pages need room for blocks as they are stored, too.
_NARROW_TABLE = {
    64: Blocks(decode=DecodeBlocks(stages=2), prefill=PrefillBlocks(stages=2)),
    128: Blocks(decode=DecodeBlocks(stages=1), prefill=PrefillBlocks(block_kv=64)),
    256: Blocks(
        decode=DecodeBlocks(stages=1, programs=2 * 132),
        prefill=PrefillBlocks(warpgroups=1, block_kv=64, stages=1),
    ),
}
_SHARED_BYTES = 232_448  # that a program may have (compute capability 9.0)
_RESERVED_BYTES = 4096  # barriers, alignment, sums of logits
_REGISTERS = {1: 255, 2: 232}  # of a thread, by computing warpgroups
_OTHER_REGISTERS = 24  # addresses, and what is left of a loop
_PAGE_SIZES = (8, 16, 32, 64, 128, 256)
_DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")


def compute_dtype(stored: jnp.dtype) -> jnp.dtype:
    """Returns the type that matrix products of pages of type `stored` take."""
    return stored if stored.itemsize == 2 else jnp.dtype(jnp.bfloat16)


def blocks_for(head_dim: int, stored: jnp.dtype) -> Blocks:
    """Returns the sizes for a head size and a type of pages."""
    table = _NARROW_TABLE if stored.itemsize == 1 else _TABLE
    return next(blocks for largest, blocks in table.items() if head_dim <= largest)


def check_pages(*, page_size: int, head_dim: int, dtype: jnp.dtype) -> None:
    """Raises ValueError for pages that the kernels cannot read."""
    if dtype.name not in _DTYPES:
        raise ValueError(
            f"KV dtype {dtype.name} is not among {_DTYPES}: "
            "the GPU's matrix instruction multiplies no float32"
        )
    if page_size not in _PAGE_SIZES:
        raise ValueError(f"{page_size=} is not among {_PAGE_SIZES}")
    if head_dim % 16 or not 16 <= head_dim <= max(_TABLE):
        raise ValueError(f"{head_dim=} must be a multiple of 16, at most {max(_TABLE)}")


def shared_bytes(sizes: DecodeBlocks | PrefillBlocks, head_dim: int, stored: jnp.dtype) -> int:
    """Returns at least the bytes of shared memory that a program takes, and 4 KiB more at most."""
    warpgroups = sizes.warpgroups if isinstance(sizes, PrefillBlocks) else 1
    # Queries in 16 bits, and outputs in as many bytes: decode writes float32 in halves.
    tiles = 2 * warpgroups * ROWS * head_dim * 2
    ring = 2 * sizes.stages * sizes.block_kv * head_dim * 2
    if stored.itemsize == 1:
        ring += 2 * RAW_STAGES * sizes.block_kv * head_dim
    return tiles + ring + _RESERVED_BYTES


def check_blocks(blocks: Blocks, head_dim: int, stored: jnp.dtype) -> None:
    """Raises ValueError for sizes that do not fit the shared memory or the registers of an SM."""
    for sizes in (blocks.decode, blocks.prefill):
        warpgroups = sizes.warpgroups if isinstance(sizes, PrefillBlocks) else 1
        if sizes.block_kv % ROWS or sizes.stages < 1 or warpgroups not in _REGISTERS:
            raise ValueError(
                f"{sizes} must have block_kv a multiple of {ROWS}, a stage or more, and "
                f"warpgroups among {tuple(_REGISTERS)}"
            )
        shared = shared_bytes(sizes, head_dim, stored)
        if shared > _SHARED_BYTES:
            raise ValueError(
                f"{sizes} with {head_dim=} and {stored.name} pages takes {shared} bytes of "
                f"shared memory; the limit is {_SHARED_BYTES}"
            )
        # Accumulator and logits in float32, weights in 16 bits.
        registers = head_dim // 2 + sizes.block_kv // 2 + sizes.block_kv // 4 + _OTHER_REGISTERS
        if registers > _REGISTERS[warpgroups]:
            raise ValueError(
                f"{sizes} with {head_dim=} takes {registers} registers of a thread; "
                f"the limit is {_REGISTERS[warpgroups]}"
            )
