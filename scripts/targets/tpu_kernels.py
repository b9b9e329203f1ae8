#!/usr/bin/env python
"""Compiles the attention kernels for TPUs that are not here, over a grid of shapes.

    .venv/bin/python scripts/targets/tpu_kernels.py --target v6e

A case passes if it compiles, updates the cache in place and copies no array of its shape. The
bundles are those of the compiler's final schedule (see `tpu_schedule`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from scripts.targets import tpu_schedule  # noqa: E402
from scripts.targets.tpu_schedule import Loop  # noqa: E402

TARGETS = ("v5e", "v6e", "v5p", "7x")
_UNROLLED = 8  # pages whose copies the kernels start between two branches


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One call of the attention contract."""

    name: str
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    kv_dtype: str = "bfloat16"
    q_dtype: str = "bfloat16"
    tokens: int = 64
    sequences: int = 64  # as many as tokens: a step of one-token sequences
    pages_per_sequence: int = 128
    num_pages: int = 2048
    block_kv: int | None = None  # keys that a one-token sequence visits at once; None: the default
    has_rules: bool = True  # sliding window, soft cap, sinks and scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What the compiler made of a case."""

    refusal: str | None = None  # why it did not compile; then the rest means nothing
    seconds: float = 0.0
    cache_bytes: int = 0
    alias_bytes: int = 0  # of arguments that results overwrite
    temp_bytes: int = 0
    cache_copies: int = 0  # instructions that make an array of the cache's shape, kernels aside
    vmem_bytes: int = 0  # of the kernel that takes most
    decode_bundles: float = 0.0  # for each key of a one-token sequence, all heads
    tile_bundles: float | None = None  # for each 1000 pairs of query and key, all heads

    @property
    def faults(self) -> tuple[str, ...]:
        """What is not as it should be."""
        if self.refusal is not None:
            return (self.refusal,)
        faults = []
        if self.alias_bytes < self.cache_bytes:
            faults.append(f"{self.alias_bytes} of {self.cache_bytes} cache bytes are in place")
        if self.cache_copies:
            faults.append(f"{self.cache_copies} copies of the cache")
        return tuple(faults)


def _mixed(name: str, **sizes: Any) -> KernelCase:
    return KernelCase(name=name, **{"tokens": 1024, "sequences": 64, **sizes})


GRID = (
    KernelCase(name="decode-512", block_kv=512, pages_per_sequence=64),
    KernelCase(name="decode"),
    KernelCase(name="decode-page16", page_size=16, pages_per_sequence=512, num_pages=8192),
    KernelCase(name="decode-page256", page_size=256, pages_per_sequence=32),
    KernelCase(name="decode-mqa", heads=8, kv_heads=1, page_size=128),
    KernelCase(name="decode-hd64", heads=9, kv_heads=3, head_dim=64),
    KernelCase(name="decode-hd256", heads=16, kv_heads=4, head_dim=256),
    KernelCase(name="decode-int8", kv_dtype="int8"),
    KernelCase(name="decode-e4m3", kv_dtype="float8_e4m3fn"),
    KernelCase(name="decode-table", tokens=256, sequences=256, page_size=16,
               pages_per_sequence=2048, num_pages=8192),
    _mixed("mixed-plain", has_rules=False),
    _mixed("mixed"),
    _mixed("mixed-hd64", heads=9, kv_heads=3, head_dim=64),
    _mixed("mixed-hd80", heads=32, kv_heads=32, head_dim=80),
    _mixed("mixed-hd96-mqa", heads=16, kv_heads=1, head_dim=96, page_size=128),
    _mixed("mixed-hd256", heads=16, kv_heads=4, head_dim=256, page_size=16, num_pages=8192),
    _mixed("mixed-f32", kv_dtype="float32", q_dtype="float32"),
    _mixed("mixed-int8", kv_dtype="int8"),
    _mixed("mixed-e4m3", kv_dtype="float8_e4m3fn", page_size=16, num_pages=8192),
    _mixed("mixed-e5m2-mqa", heads=8, kv_heads=1, kv_dtype="float8_e5m2", page_size=32),
    _mixed("mixed-table", tokens=2048, sequences=256, page_size=16, pages_per_sequence=2048,
           num_pages=8192),
)  # fmt: skip


def figures_of(target: str, cases: Iterable[KernelCase]) -> Iterator[tuple[KernelCase, Figures]]:
    """Compiles cases for one target in a process of their own, whose compiler dumps schedules."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LIBTPU_INIT_ARGS": tpu_schedule.dump_flags(Path(folder))}
        command = [sys.executable, __file__, "--worker", folder, "--target", target]
        worker = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with worker:
            assert worker.stdin is not None and worker.stdout is not None
            for case in cases:
                print(json.dumps(dataclasses.asdict(case)), file=worker.stdin, flush=True)
                answer = worker.stdout.readline()
                if not answer:
                    raise RuntimeError(f"the compiler's process ended on {case}")
                yield case, Figures(**json.loads(answer))
            worker.stdin.close()


def compile_case(target: str, case: KernelCase, folder: Path) -> Figures:
    """Compiles a case in this process, whose compiler dumps schedules to `folder`."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from jaxserve.planning.targets import devices_of

    device = devices_of(target)[0]
    mesh = jax.sharding.Mesh([device], ("tensor",))
    sharding = SingleDeviceSharding(device)
    started_s = time.monotonic()
    try:
        with jax.set_mesh(mesh):  # lowering asks it which TPU it is for
            call, operands, kernel_target = _call_of(case, sharding)
            compiled = jax.jit(call, donate_argnums=3).lower(*operands).compile()
    except Exception as error:  # a compiler may refuse in any way: the table says how
        return Figures(refusal=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}")
    seconds = time.monotonic() - started_s
    sizes: Any = compiled.memory_analysis()
    (stored,) = operands[3]
    is_mixed = case.sequences < case.tokens
    kernels = ["attend_one", *(["write_pages", "attend_tiles"] if is_mixed else [])]
    figures = Figures(
        seconds=seconds,
        cache_bytes=stored.size * stored.dtype.itemsize,
        alias_bytes=sizes.alias_size_in_bytes,
        temp_bytes=sizes.temp_size_in_bytes,
        cache_copies=_count_copies(compiled.as_text() or "", stored.shape),
        vmem_bytes=max(tpu_schedule.vmem_bytes(folder, kernel) for kernel in kernels),
        decode_bundles=_decode_bundles(
            case, kernel_target, tpu_schedule.read(folder, "attend_one")
        ),
        tile_bundles=(
            _tile_bundles(case, kernel_target, tpu_schedule.read(folder, "attend_tiles"))
            if is_mixed
            else None
        ),
    )
    for path in folder.iterdir():  # a case dumps 100 MB
        path.unlink()
    return figures


def _call_of(case: KernelCase, sharding: Any) -> tuple[Any, tuple[Any, ...], Any]:
    """Returns the function to compile, its operands, and the sizes that the kernels go by."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.ragged_paged_attention import tpu
    from pallas_kernels.targets import TPU

    target = TPU
    if case.block_kv is not None:
        width = case.kv_heads * _pages_of(case).lanes
        target = dataclasses.replace(TPU, decode_block_numbers=case.block_kv * width)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def call(q, k, v, cache, kv_lens, page_table, cu_q_lens, counts, sinks, scales):
        rules: dict[str, Any] = {}
        if case.has_rules:
            rules = {"sliding_window": 1000, "soft_cap": 30.0, "sinks": sinks}
            rules |= {"k_scale": scales[0], "v_scale": scales[1]}
        return tpu.attend(
            q, k, v, cache, kv_lens, page_table, cu_q_lens, counts,
            scale=0.1, target=target, **rules,
        )  # fmt: skip

    (shape,) = tpu.page_shapes(
        case.num_pages,
        page_size=case.page_size,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=jnp.dtype(case.kv_dtype),
    )
    q_dtype = jnp.dtype(case.q_dtype)
    new = array(case.tokens, case.kv_heads, case.head_dim, dtype=q_dtype)
    operands = (
        array(case.tokens, case.heads, case.head_dim, dtype=q_dtype),
        *(new, new, (array(*shape.shape, dtype=shape.dtype),)),
        array(case.sequences),
        array(case.sequences, case.pages_per_sequence),
        array(case.sequences + 1),
        array(2),
        array(case.heads, dtype=jnp.float32),
        array(2, dtype=jnp.float32),
    )
    return call, operands, target


def _pages_of(case: KernelCase) -> Any:
    import jax.numpy as jnp

    from pallas_kernels.ragged_paged_attention.tpu_pages import Pages

    return Pages(
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=jnp.dtype(case.kv_dtype),
    )


def _count_copies(text: str, shape: tuple[int, ...]) -> int:
    """Counts instructions of a compiled program that make an array of this shape."""
    dims = ",".join(map(str, shape))
    made = re.findall(rf"= [a-z]+[a-z0-9]*\[{dims}\]\S* ([a-z-]+)\(", text)
    harmless = {"parameter", "get-tuple-element", "custom-call", "bitcast"}
    return sum(instruction not in harmless for instruction in made)


def _decode_bundles(case: KernelCase, target: Any, kernel: Loop) -> float:
    """Returns bundles for each key in the loop over blocks, all its conditions taken."""
    from pallas_kernels.ragged_paged_attention.tpu_blocks import decode_blocks

    pages = decode_blocks(
        _pages_of(case),
        group=case.heads // case.kv_heads,
        sequences=case.sequences,
        pages_per_sequence=case.pages_per_sequence,
        target=target,
    ).pages
    block = tpu_schedule.heaviest(kernel)
    return (block.bundles + _fetch_bundles(block, pages.per_block)) / pages.block_kv


def _tile_bundles(case: KernelCase, target: Any, kernel: Loop) -> float:
    """Returns bundles for each 1000 pairs in the loop over blocks, all its conditions taken."""
    from pallas_kernels.ragged_paged_attention.tpu_blocks import tile_blocks

    blocks = tile_blocks(
        _pages_of(case),
        group=case.heads // case.kv_heads,
        tokens=case.tokens,
        pages_per_sequence=case.pages_per_sequence,
        target=target,
    )
    heads = tpu_schedule.heaviest(kernel)
    trips = case.kv_heads // blocks.heads
    bundles = heads.bundles * trips
    block = heads
    if trips > 1:  # else the compiler leaves no loop over heads
        block = next(loop for loop in kernel.walk() if heads in loop.inner)
        bundles += block.bundles
    bundles += _fetch_bundles(block, blocks.pages.per_block)
    return 1000 * bundles / (blocks.block_q * blocks.pages.block_kv)


def _fetch_bundles(block: Loop, per_block: int) -> int:
    """Returns what starting the copies of a whole block takes beside the block's own bundles."""
    copies = [loop for loop in block.inner if loop.has_copy]
    if block.has_copy or not copies:  # without a loop
        return 0
    return copies[0].bundles * -(-per_block // _UNROLLED)


def _work(target: str, folder: Path) -> None:
    """Compiles the cases that come on stdin, and answers each with its figures."""
    from scripts.compile_targets import use_compilers

    use_compilers()
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for line in sys.stdin:
        figures = compile_case(target, KernelCase(**json.loads(line)), folder)
        print(json.dumps(dataclasses.asdict(figures)), flush=True)


def line_of(target: str, case: KernelCase, figures: Figures) -> str:
    """Returns a line of the table."""
    start = f"{target:6} {case.name:16}"
    if figures.refusal is not None:
        return f"{start} {figures.refusal}"
    tile = "" if figures.tile_bundles is None else f"{figures.tile_bundles:.0f}"
    return (
        f"{start} {figures.seconds:7.1f} {figures.temp_bytes / 2**20:8.1f} "
        f"{figures.vmem_bytes / 2**20:8.1f} {figures.decode_bundles:10.2f} {tile:>10}  "
        f"{'; '.join(figures.faults) or 'compiled'}"
    )


def print_table(targets: Iterable[str], names: Iterable[str] | None = None) -> int:
    """Compiles the grid, or the cases named, and prints a line for each; returns the status."""
    print(
        f"{'target':6} {'case':16} {'seconds':>7} {'temp MiB':>8} {'VMEM MiB':>8} "
        f"{'bundle/key':>10} {'/1000 pair':>10}  verdict"
    )
    cases = [case for case in GRID if names is None or case.name in names]
    is_good = True
    for target in targets:
        for case, figures in figures_of(target, cases):
            print(line_of(target, case, figures), flush=True)
            is_good &= not figures.faults
    return 0 if is_good else 1


def main() -> int:
    """Prints the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="repeat for several")
    parser.add_argument("--case", choices=[case.name for case in GRID], action="append")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        _work(options.target[0], options.worker)
        return 0
    return print_table(options.target or TARGETS, options.case)


if __name__ == "__main__":
    sys.exit(main())
