"""Facts about the hardware that kernels run on, and block sizes: data only."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, kw_only=True)
class TpuTarget:
    """One TPU core, and the block sizes that its schedules are shortest with."""

    vmem_bytes: int  # what one kernel may take, compiler's own use left out
    smem_bytes: int
    decode_block_bytes: int  # keys and values that a one-token sequence visits at once
    decode_rows: int  # one-token sequences to a grid step
    tile_rows: int  # rows of one kv head (tokens times query heads of it) in a tile of queries
    tile_block_kv: int  # keys that a tile visits at once


# v5p and 7x have 64 MiB of VMEM, v5e and v6e 128. 48 leave room for spills on all of them.
TPU = TpuTarget(
    vmem_bytes=48 * MIB,
    smem_bytes=960 * KIB,
    decode_block_bytes=2 * MIB,
    decode_rows=8,
    tile_rows=256,
    tile_block_kv=512,
)
