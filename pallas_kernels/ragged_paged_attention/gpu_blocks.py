"""How many rows and keys the GPU kernels take at once, and what that costs in shared memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DecodeBlocks:
    """Sizes of the kernel for sequences of one token."""

    block_kv: int = 64  # keys visited at once
    stages: int = 2  # blocks of keys in shared memory
    programs: int = 2 * 2 * 132  # that fill the device: programs an SM, waves of them, SMs
    min_split: int = 4  # blocks that are worth a program
