"""How many rows and keys the GPU kernels take at once, and what that costs in shared memory."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp


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
