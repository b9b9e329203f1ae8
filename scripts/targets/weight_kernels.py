#!/usr/bin/env python
"""Compiles products with quantised weights for devices that are not here: XLA's way, and a kernel.

    .venv/bin/python scripts/targets/weight_kernels.py --target v5e --weights int4 --rows 16 2048

Cycles on a TPU are XLA's own estimates of its operations, and for the kernel the bundles of the
final schedule (see `tpu_schedule`) times how often they run; neither knows waits for memory. For a
GPU there are only the temporaries: whether a matrix of floats is among them.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from scripts.targets import tpu_schedule  # noqa: E402

TARGETS = ("v5e", "v6e", "v5p", "7x", "h100", "a100")
# Llama-3.1-8B's: queries and outputs, keys or values, gate or up, down.
SHAPES = {"q": (4096, 4096), "k": (1024, 4096), "up": (14336, 4096), "down": (4096, 14336)}
ROWS = (1, 16, 64, 256, 2048)
# Type, columns that share a scale (None: all of a row), rows that do, and whether there are zeros.
WEIGHTS: dict[str, tuple[str, int | None, int, bool]] = {
    "bf16": ("bfloat16", None, 1, False),
    "int8": ("int8", None, 1, False),
    "fp8": ("float8_e4m3fn", None, 1, False),
    "fp8-blocks": ("float8_e4m3fn", 128, 128, False),
    "int4": ("int4", 32, 1, True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """One product."""

    target: str
    weight: str  # of WEIGHTS
    rows: int
    shape: str = "up"  # of SHAPES
    is_xla: bool = False  # XLA's way, where there is a kernel

    @property
    def groups(self) -> int:
        """How many groups the columns are in."""
        in_size = SHAPES[self.shape][1]
        return in_size // (WEIGHTS[self.weight][1] or in_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What the compiler made of it."""

    way: str  # "kernel" or "XLA"
    cycles: int  # 0 for a GPU
    temp_bytes: int
    argument_bytes: int
    num_dense: int  # arrays in memory that hold the matrix as floats


def has_kernel(target: str, weight: str) -> bool:
    """Returns whether a Pallas kernel multiplies it, unless XLA's way is asked for."""
    columns = WEIGHTS[weight][1]
    return columns is not None and (target, weight) != ("a100", "fp8-blocks")


def figures_of(products: Sequence[Product]) -> Iterator[tuple[Product, Figures]]:
    """Compiles products in a process of their own, whose compiler dumps schedules."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LIBTPU_INIT_ARGS": tpu_schedule.dump_flags(Path(folder))}
        asked = json.dumps([dataclasses.asdict(product) for product in products])
        command = [sys.executable, __file__, "--worker", folder, "--products", asked]
        with subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            for product, line in zip(products, process.stdout, strict=True):
                yield product, Figures(**json.loads(line))
        if process.returncode:
            raise RuntimeError(f"the compiler's process ended with {process.returncode}")


def compile_product(product: Product, folder: Path) -> Figures:
    """Compiles a product in this process, whose compiler dumps schedules to `folder`."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, SingleDeviceSharding

    from jaxserve.ops.linear import linear
    from jaxserve.planning.targets import compiler_options, devices_of
    from scripts.compile_targets import KERNEL_CALLS, count_dense

    device = devices_of(product.target)[0]
    out_size, in_size = SHAPES[product.shape]

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    with jax.set_mesh(Mesh([device], ("tensor",))):
        x = array((product.rows, in_size), jnp.bfloat16)
        lowered = jax.jit(linear).lower(x, _weight_of(product, device, array))
        compiled = lowered.compile(compiler_options=compiler_options(product.target))
    text = compiled.as_text() or ""
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("ENTRY") :])))
    if "tpu_custom_call" in text:
        cycles += _kernel_cycles(tpu_schedule.read(folder, "quantized_matmul"), product)
    for path in folder.iterdir():
        path.unlink()
    sizes: Any = compiled.memory_analysis()
    return Figures(
        way="kernel" if re.search(KERNEL_CALLS, text) else "XLA",
        cycles=cycles,
        temp_bytes=sizes.temp_size_in_bytes,
        argument_bytes=sizes.argument_size_in_bytes,
        num_dense=0 if product.weight == "bf16" else count_dense(text, [(out_size, in_size)]),
    )


def _weight_of(product: Product, device: Any, array: Any) -> Any:
    import jax.numpy as jnp

    from jaxserve.ops.quantization import (
        Kernel,
        QuantizedWeight,
        form_for,
        kernel_refusal,
    )

    out_size, in_size = SHAPES[product.shape]
    name, _, shared_rows, has_zero = WEIGHTS[product.weight]
    data = array((out_size, in_size), jnp.dtype(name))
    if product.weight == "bf16":
        return data
    refusal = kernel_refusal(
        device,
        jnp.dtype(name),
        dense_dtype=jnp.dtype(jnp.bfloat16),
        out_size=out_size,
        in_size=in_size,
        num_groups=product.groups,
    )
    form = form_for(
        "gpu" if device.platform == "cuda" else device.platform,
        is_native=False,
        has_kernel=refusal is None,
        activations="float",
        num_groups=product.groups,
        has_zero=has_zero,
        in_size=in_size,
    )
    return QuantizedWeight(
        data=data,
        scale=array((product.groups, out_size // shared_rows), jnp.float32),
        zero=array((product.groups, out_size), jnp.int8) if has_zero else None,
        rows=shared_rows,
        form=form.otherwise if product.is_xla and isinstance(form, Kernel) else form,
    )


def _kernel_cycles(kernel: tpu_schedule.Loop, product: Product) -> int:
    """Returns the bundles of all grid steps: eight groups at a time inside, blocks outside."""
    from pallas_kernels.quantized_matmul import tpu

    (step,) = kernel.inner
    (visit,) = step.inner
    is_few = product.rows <= tpu._FEW_ROWS
    most = tpu._FEW_BLOCK_OUT if is_few else tpu._MANY_BLOCK_OUT
    blocks = SHAPES[product.shape][0] // tpu._block_out(SHAPES[product.shape][0], most)
    row_blocks = 1 if is_few else -(-product.rows // tpu._MANY_BLOCK_ROWS)
    return blocks * (row_blocks * step.bundles + product.groups // tpu.SUBLANES * visit.bundles)


def _work(products: list[dict[str, Any]], folder: Path) -> None:
    """Compiles the products and prints the figures of each."""
    from scripts.compile_targets import use_compilers

    use_compilers()
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for product in products:
        figures = compile_product(Product(**product), folder)
        print(json.dumps(dataclasses.asdict(figures)), flush=True)


def main() -> int:
    """Prints the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=TARGETS)
    parser.add_argument("--weights", choices=WEIGHTS, nargs="+", default=list(WEIGHTS))
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["up"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--products", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.products, options.worker)
        return 0
    products = [
        Product(target=target, weight=weight, shape=shape, rows=rows, is_xla=is_xla)
        for target in options.target
        for weight in options.weights
        for shape in options.shape
        for rows in options.rows
        for is_xla in (False, True)
        if not is_xla or has_kernel(target, weight)
    ]
    print(
        f"{'target':6} {'weight':10} {'shape':5} {'rows':>5} {'way':6} {'args MiB':>8} "
        f"{'temp MiB':>8} {'dense':>5} {'cycles':>10}"
    )
    for product, figures in figures_of(products):
        print(
            f"{product.target:6} {product.weight:10} {product.shape:5} {product.rows:5} "
            f"{figures.way:6} {figures.argument_bytes / 2**20:8.1f} "
            f"{figures.temp_bytes / 2**20:8.1f} {figures.num_dense:5} {figures.cycles:10,}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
