"""Facts about the hardware that kernels run on, and block sizes: data only."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, kw_only=True)
class TpuTarget:
    """One TPU core, and the block sizes that its schedules are shortest with."""

    device_kinds: tuple[str, ...]  # how JAX names devices that this is for
    vmem_bytes: int  # for one kernel, with what the compiler needs itself
    compiler_vmem_bytes: int  # what it may need: registers that do not fit, operands widened
    smem_bytes: int
    decode_rows: int  # one-token sequences to a grid step
    decode_block_numbers: int  # numbers in the keys (or values) that such a sequence visits at once
    decode_max_block_kv: int
    tile_rows: int  # rows of one kv head (tokens times query heads of it) in a tile of queries
    tile_block_kv: int  # keys that a tile visits at once
    tile_heads: int  # kv heads computed together: one's products overlap another's softmax
    max_write_bytes: int  # pages and new rows in one step of the writing kernel


# v5p and 7x have 64 MiB of VMEM, v5e and v6e 128: one choice that fits all of them. A decode block
# of 1024 keys of 8 heads takes 15 to 20 % fewer bundles a key than one of 512; a tile of 256 rows
# with 4 heads at once takes 12 to 30 % fewer than with 1.
TPU = TpuTarget(
    device_kinds=(
        *("TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p"),
        *("TPU v6 lite", "TPU v6e", "TPU7x", "TPU7"),
    ),
    vmem_bytes=48 * MIB,
    compiler_vmem_bytes=8 * MIB,
    smem_bytes=896 * KIB,
    decode_rows=8,
    decode_block_numbers=1024 * 8 * 128,
    decode_max_block_kv=2048,
    tile_rows=256,
    tile_block_kv=512,
    tile_heads=4,
    max_write_bytes=16 * MIB,
)
