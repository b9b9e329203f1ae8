#!/usr/bin/env python
"""Compiles grouped products for devices that are not here, and XLA's own beside ours.

    .venv/bin/python scripts/targets/expert_kernels.py --target v6e

Bundles are those of the compiler's final schedule (see `tpu_schedule`), of all visits, where every
group has as many rows. XLA's kernel wants matrices [groups, in, out]: it gets them so. On a GPU
ours is a loop over tiles in XLA, and there are only temporaries to compare.
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from scripts.targets import tpu_schedule  # noqa: E402

TARGETS = ("v5e", "v6e", "v5p", "7x", "h100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCase:
    """One grouped product."""

    name: str
    groups: int = 128
    rows: int = 512
    out: int = 768
    in_: int = 2048
    dtype: str = "bfloat16"  # of matrices; 8-bit ones have scales
    is_xla: bool = False  # `jax.lax.ragged_dot`

    @property
    def groups_with_rows(self) -> int:
        """How many groups have rows, the same number each."""
        return min(self.groups, self.rows)


GRID = (
    ProductCase(name="up-64", rows=64),
    ProductCase(name="up-64-xla", rows=64, is_xla=True),
    ProductCase(name="up-512"),
    ProductCase(name="up-512-xla", is_xla=True),
    ProductCase(name="up-16384", rows=16384),
    ProductCase(name="up-16384-xla", rows=16384, is_xla=True),
    ProductCase(name="up-int8", dtype="int8"),
    ProductCase(name="up-e4m3", dtype="float8_e4m3fn"),
    ProductCase(name="up-f32", dtype="float32"),
    ProductCase(name="down-512", out=2048, in_=768),
    ProductCase(name="down-part", out=2048, in_=96),  # of a mesh of 8
    ProductCase(name="up-part", out=96),
    ProductCase(name="mixtral-up", groups=8, rows=1024, out=14336, in_=4096),
    ProductCase(name="mixtral-up-xla", groups=8, rows=1024, out=14336, in_=4096, is_xla=True),
    ProductCase(name="mixtral-down", groups=8, rows=1024, out=4096, in_=14336),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductFigures:
    """What the compiler made of a case."""

    refusal: str | None = None  # why it did not compile; then the rest means nothing
    temp_bytes: int = 0
    visit_bundles: int = 0  # of one grid step
    num_visits: int = 0  # grid steps that multiply

    @property
    def bundles(self) -> int:
        """Of all of them."""
        return self.visit_bundles * self.num_visits


def figures_of(
    target: str, cases: Iterable[ProductCase]
) -> Iterator[tuple[ProductCase, ProductFigures]]:
    """Compiles cases for one target in a process of their own, whose compiler dumps schedules."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LIBTPU_INIT_ARGS": tpu_schedule.dump_flags(Path(folder))}
        names = [case.name for case in cases]
        command = [sys.executable, __file__, "--worker", folder, "--target", target]
        command += [word for name in names for word in ("--case", name)]
        done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE)
        lines = done.stdout.splitlines()
        if done.returncode or len(lines) != len(names):
            raise RuntimeError(f"the compiler's process ended with {done.returncode}")
        for name, line in zip(names, lines, strict=True):
            yield _by_name(name), ProductFigures(**json.loads(line))


def compile_case(target: str, case: ProductCase, folder: Path) -> ProductFigures:
    """Compiles a case in this process, whose compiler dumps schedules to `folder`."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from jaxserve.planning.targets import compiler_options, devices_of

    device = devices_of(target)[0]
    is_gpu = device.platform != "tpu"
    try:
        with jax.set_mesh(jax.sharding.Mesh([device], ("tensor",))):
            call, operands = _call_of(
                case, "reference" if is_gpu else "tpu", SingleDeviceSharding(device)
            )
            lowered = jax.jit(call).lower(*operands)
            compiled = lowered.compile(compiler_options=compiler_options(target))
    except Exception as error:  # a compiler may refuse in any way: the table says how
        text = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        return ProductFigures(refusal=text)
    sizes: Any = compiled.memory_analysis()
    if is_gpu:
        return ProductFigures(temp_bytes=sizes.temp_size_in_bytes)
    kernel = tpu_schedule.read(folder, "ragged-dot-none" if case.is_xla else "grouped_matmul")
    figures = ProductFigures(
        temp_bytes=sizes.temp_size_in_bytes,
        visit_bundles=tpu_schedule.heaviest(kernel).bundles,
        num_visits=_num_visits(case, compiled.as_text() or ""),
    )
    for path in folder.iterdir():
        path.unlink()
    return figures


def _call_of(case: ProductCase, backend: Any, sharding: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the function to compile and its operands."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import grouped_matmul

    def array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    scale = None
    if jnp.dtype(case.dtype).itemsize == 1:
        scale = array(case.groups, case.out, dtype=jnp.float32)
    rows = array(case.rows, case.in_, dtype="float32" if case.dtype == "float32" else "bfloat16")
    sizes = array(case.groups, dtype=jnp.int32)
    if case.is_xla:
        matrices = array(case.groups, case.in_, case.out, dtype=case.dtype)
        return jax.lax.ragged_dot, (rows, matrices, sizes)
    matrices = array(case.groups, case.out, case.in_, dtype=case.dtype)

    def call(*arrays: Any) -> jax.Array:
        return grouped_matmul(*arrays, backend=backend, out_dtype=rows.dtype)

    return call, (rows, matrices, sizes, scale)


def _num_visits(case: ProductCase, program: str) -> int:
    """Returns how many grid steps multiply: tiles of rows that each group has, times parts."""
    from pallas_kernels.grouped_matmul import tpu

    tile = tpu._block_rows(case.rows, case.groups)
    block_out = tpu._block_out(case.out, case.in_ * (4 if case.dtype == "float32" else 2))
    if case.is_xla:
        found = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', program)
        assert found is not None and int(found[2]) == case.in_, program
        tile, block_out = int(found[1]), int(found[3])
    elif "int8" in case.dtype or "float8" in case.dtype:
        block_out = tpu._block_out(case.out, case.in_)
    size = case.rows // case.groups_with_rows
    visits = sum(
        (first + size - 1) // tile - first // tile + 1
        for first in range(0, size * case.groups_with_rows, size)
    )
    return visits * -(-case.out // block_out)


def _by_name(name: str) -> ProductCase:
    return next(case for case in GRID if case.name == name)


def _work(target: str, names: Iterable[str], folder: Path) -> None:
    """Compiles the cases and prints the figures of each."""
    from scripts.compile_targets import use_compilers

    use_compilers()
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for name in names:
        figures = compile_case(target, _by_name(name), folder)
        print(json.dumps(dataclasses.asdict(figures)), flush=True)


def main() -> int:
    """Prints the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--case", choices=[case.name for case in GRID], action="append")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.case or [case.name for case in GRID]
    if options.worker is not None:
        _work(options.target[0], names, options.worker)
        return 0
    is_good = True
    print(f"{'target':6} {'case':16} {'temp MiB':>8} {'a visit':>8} {'visits':>7} {'bundles':>9}")
    for target in options.target or TARGETS:
        for case, figures in figures_of(target, [_by_name(name) for name in names]):
            is_good &= figures.refusal is None
            sizes = (
                f"{figures.temp_bytes / 2**20:8.1f} {figures.visit_bundles:8} "
                f"{figures.num_visits:7} {figures.bundles:9}"
            )
            print(f"{target:6} {case.name:16} {figures.refusal or sizes}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
