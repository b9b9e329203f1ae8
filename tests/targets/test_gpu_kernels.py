"""The attention kernels compiled for GPUs that are not here, and what they take of them."""

import tomllib
from pathlib import Path

import jax.numpy as jnp
import pytest

from scripts.targets.gpu_kernels import KernelCase, compile_kernels

pytestmark = pytest.mark.slow

BOUNDS = tomllib.loads((Path(__file__).parent / "gpu_kernel_bounds.toml").read_text())
CASES = [
    KernelCase(),
    KernelCase(page_size=256, sliding_window=4096, soft_cap=50.0),
    KernelCase(head_dim=64, has_sinks=True, sliding_window=128),
    KernelCase(head_dim=64, heads=71, kv_heads=1, dtype="float16"),
    KernelCase(head_dim=80, page_size=8),
    KernelCase(head_dim=96, heads=32, kv_heads=32),
    KernelCase(head_dim=256, heads=8, kv_heads=1),
    KernelCase(dtype="float8_e4m3fn"),
    KernelCase(head_dim=64, dtype="int8", page_size=64),
    KernelCase(step="mixed"),
    KernelCase(step="mixed", head_dim=64, heads=9, kv_heads=3, sliding_window=128, has_sinks=True),
    KernelCase(step="mixed", head_dim=80, page_size=64),
    KernelCase(step="mixed", head_dim=256, heads=8, page_size=256),
    KernelCase(step="mixed", dtype="float8_e5m2", soft_cap=50.0),
    KernelCase(step="mixed", head_dim=256, dtype="int8"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_compile_in_place_and_within_their_bounds(case):
    compiled = compile_kernels(case)
    assert compiled.refusal is None
    assert compiled.alias_bytes >= compiled.cache_bytes and compiled.cache_copies == 0
    main_kernel = "decode" if case.step == "decode" else "prefill"
    assert f"paged_attention_{main_kernel}" in compiled.kernels
    for name, kernel in compiled.kernels.items():
        bounds = BOUNDS[name.removeprefix("paged_attention_")]
        bound = next(bounds[size] for size in bounds if case.head_dim <= int(size))
        assert kernel.registers <= bound["registers"]
        assert kernel.shared_bytes <= bound["shared_kib"] * 1024
        assert kernel.spill_bytes <= bound["spill_bytes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_budget_of_shared_memory_is_what_the_compiler_takes(dtype):
    from pallas_kernels.ragged_paged_attention.gpu_blocks import blocks_for, shared_bytes

    # Sizes of their own, for Mosaic says nothing of a kernel that it compiled before.
    case = KernelCase(step="mixed", head_dim=112, heads=16, dtype=dtype)
    blocks = blocks_for(case.head_dim, jnp.dtype(dtype))
    kernels = compile_kernels(case).kernels
    for name, sizes in (("decode", blocks.decode), ("prefill", blocks.prefill)):
        budget = shared_bytes(sizes, case.head_dim, jnp.dtype(dtype))
        taken = kernels[f"paged_attention_{name}"].shared_bytes
        assert budget - 4096 <= taken <= budget


# Two that take most, and one of each other card's. Bounds of the card with least shared memory.
OLDER = [
    KernelCase(target="a100", step="mixed", dtype="int8"),
    KernelCase(target="a100", step="mixed", head_dim=80, page_size=4, has_sinks=True),
    KernelCase(target="a10", step="mixed", head_dim=256, heads=8, sliding_window=128),
    KernelCase(target="l4", step="mixed", head_dim=64, dtype="float8_e4m3fn", soft_cap=50.0),
]


@pytest.mark.parametrize("case", OLDER, ids=str)
def test_the_kernels_for_older_cards_compile_in_place_and_spill_nothing(case):
    compiled = compile_kernels(case)
    assert compiled.refusal is None
    assert compiled.alias_bytes >= compiled.cache_bytes and compiled.cache_copies == 0
    names = {f"paged_attention_{name}" for name in ("decode", "merge", "prefill")}
    assert compiled.kernels.keys() == names
    for kernel in compiled.kernels.values():
        assert kernel.spill_bytes == 0
        assert kernel.shared_bytes <= 99 * 1024
    assert compiled.kernels["paged_attention_decode"].registers <= 168


def test_float8_pages_that_a_card_cannot_convert_are_not_compiled():
    compiled = compile_kernels(KernelCase(target="a100", dtype="float8_e4m3fn"))
    assert compiled.kernels == {} and "8.9" in (compiled.refusal or "")


def test_what_does_not_compile_says_why():
    compiled = compile_kernels(KernelCase(head_dim=72))
    assert compiled.kernels == {} and "head_dim=72" in (compiled.refusal or "")
