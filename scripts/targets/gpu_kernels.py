"""The attention kernels compiled for GPUs that are not here: which shapes, and what came of them.

    .venv/bin/python -m scripts.targets.gpu_kernels

`compile_kernels` compiles one case and reads registers, spills and shared memory from what Mosaic
GPU, XLA and `ptxas` say of each kernel. Compiler errors are results too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxserve.planning.targets import devices_of
from scripts.compile_targets import use_compilers

# The sequences of a mixed step differ from a decode step's in number: Mosaic compiles a kernel once
# for a process, and says nothing of it the second time.
DECODES = 64  # of a decode step
TOKENS, SEQUENCES = 2048, 48  # of a mixed step
PAGES_PER_SEQUENCE, POSITIONS = 512, 65536
TARGETS = ("h100", "a100", "a10", "l4")


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One shape of step, on one kind of card."""

    target: str = "h100"
    step: str = "decode"  # or "mixed"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"  # of pages
    sliding_window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False

    def __str__(self) -> str:
        """Returns the case in a few words, as a test's or a table row's name."""
        words = [self.target] if self.target != "h100" else []
        words += [self.step, f"{self.heads}/{self.kv_heads}x{self.head_dim}", self.dtype]
        words.append(f"page{self.page_size}")
        words += [f"window{self.sliding_window}"] if self.sliding_window else []
        words += ["cap"] if self.soft_cap else []
        words += ["sinks"] if self.has_sinks else []
        return "-".join(words)


@dataclass(frozen=True, kw_only=True)
class KernelFigures:
    """What the compilers say of one kernel."""

    registers: int  # of a thread, when the kernel starts
    spill_bytes: int  # stores and loads
    shared_bytes: int  # of a program


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A case that compiled, or the reason why not."""

    kernels: dict[str, KernelFigures]
    alias_bytes: int = 0  # of the cache that is updated in place
    cache_bytes: int = 0
    cache_copies: int = 0
    refusal: str | None = None


CASES = [
    KernelCase(step=step, head_dim=head_dim, page_size=page_size, dtype=dtype)
    for step in ("decode", "mixed")
    for head_dim in (64, 80, 96, 128, 256)
    for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
    for page_size in (8, 16, 64, 256)
    if dtype == "bfloat16" or page_size == 16
] + [
    KernelCase(step=step, **shape)
    for step in ("decode", "mixed")
    for shape in (
        {"heads": 8, "kv_heads": 1, "head_dim": 256},
        {"heads": 71, "kv_heads": 1, "head_dim": 64},
        {"heads": 9, "kv_heads": 3, "head_dim": 64},
        {"heads": 8, "kv_heads": 8},
        {"heads": 8, "kv_heads": 8, "head_dim": 256},
        {"heads": 16, "kv_heads": 8, "head_dim": 192},
        {"sliding_window": 4096},
        {"soft_cap": 50.0},
        {"has_sinks": True, "head_dim": 64, "sliding_window": 128},
    )
]
# A mixed step holds the kernels of a decode step, too.
CASES += [
    KernelCase(target=target, step="mixed", head_dim=head_dim, dtype=dtype)
    for target in ("a100", "a10", "l4")
    for head_dim in (64, 80, 96, 128, 256)
    for dtype in ("bfloat16", "float16", "int8", "float8_e5m2", "float8_e4m3fn")
    if dtype == "bfloat16" or target == "l4" or (target == "a100" and dtype != "float8_e4m3fn")
] + [
    KernelCase(target="a100", step="mixed", **shape)
    for shape in (
        {"page_size": 4},
        {"page_size": 256},
        {"heads": 71, "kv_heads": 1, "head_dim": 64},
        {"heads": 8, "kv_heads": 8},
        {"heads": 16, "kv_heads": 8, "head_dim": 72},
        {"sliding_window": 4096, "soft_cap": 50.0},
        {"has_sinks": True, "head_dim": 64, "sliding_window": 128},
    )
]


def compile_kernels(case: KernelCase) -> Compiled:
    """Compiles the attention of one step for the case's card, with the kernels that it gets."""
    _use_mosaic_runtime()
    from pallas_kernels.ragged_paged_attention import gpu, triton

    kernels_of = gpu if case.target == "h100" else triton
    device = devices_of(case.target)[0]
    try:
        if reason := kernels_of.device_refusal(device, jnp.dtype(case.dtype)):
            return Compiled(kernels={}, refusal=reason)
        pages = kernels_of.page_shapes(
            POSITIONS // case.page_size, page_size=case.page_size, kv_heads=case.kv_heads,
            head_dim=case.head_dim, dtype=jnp.dtype(case.dtype),
        )  # fmt: skip
        attend = partial(
            kernels_of.attend, scale=case.head_dim**-0.5, sliding_window=case.sliding_window,
            soft_cap=case.soft_cap,
        )  # fmt: skip
        with _dump_folder() as folder:
            lowered = jax.jit(attend, donate_argnames="cache").lower(
                **_arguments(case, pages, device)
            )
            compiled = lowered.compile(
                compiler_options={"xla_gpu_autotune_level": "0", "xla_dump_to": str(folder)}
            )
            figures_in = _figures_in if kernels_of is gpu else _triton_figures_in
            kernels = dict(figures_in(folder))
    except Exception as error:  # a compiler may refuse in any way: the table says how
        reason = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:200]}"
        return Compiled(kernels={}, refusal=reason)
    sizes: Any = compiled.memory_analysis()
    shape = ",".join(map(str, pages[0].shape))
    return Compiled(
        kernels=kernels,
        alias_bytes=sizes.alias_size_in_bytes,
        cache_bytes=sum(side.size * side.dtype.itemsize for side in pages),
        cache_copies=len(re.findall(rf"\[{shape}\]\S* copy\(", compiled.as_text() or "")),
    )


def _use_mosaic_runtime() -> None:
    """Tells Mosaic GPU where its runtime is: it looks when imported, which may have been before."""
    use_compilers()
    plugin = importlib.util.find_spec("jax_cuda13_plugin")
    assert plugin is not None and plugin.origin is not None, "scripts/test installs the compilers"
    runtime = Path(plugin.origin).parent / "libmosaic_gpu_runtime.so"
    os.environ.setdefault("MOSAIC_GPU_RUNTIME_LIB_PATH", str(runtime))


def _arguments(
    case: KernelCase, pages: tuple[jax.ShapeDtypeStruct, ...], compile_only: jax.Device
) -> dict[str, Any]:
    """Returns the abstract arguments of `attend`, on the device."""
    is_decode = case.step == "decode"
    tokens, sequences = (DECODES, DECODES) if is_decode else (TOKENS, SEQUENCES)
    device = SingleDeviceSharding(compile_only)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    new = array((tokens, case.kv_heads, case.head_dim), jnp.bfloat16)
    is_scaled = pages[0].dtype.itemsize == 1
    scale = array((), jnp.float32) if is_scaled else None
    return {
        "q": array((tokens, case.heads, case.head_dim), jnp.bfloat16),
        "k": new,
        "v": new,
        "cache": tuple(array(side.shape, side.dtype) for side in pages),
        "kv_lens": array((sequences,), jnp.int32),
        "page_table": array((sequences, PAGES_PER_SEQUENCE), jnp.int32),
        "cu_q_lens": array((sequences + 1,), jnp.int32),
        "counts": array((2,), jnp.int32),
        "sinks": array((case.heads,), jnp.float32) if case.has_sinks else None,
        "k_scale": scale,
        "v_scale": scale,
    }


@contextmanager
def _dump_folder() -> Iterator[Path]:
    """Yields a folder where Mosaic GPU writes what it makes, while the context is open."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("MOSAIC_GPU_DUMP_TO")
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["MOSAIC_GPU_DUMP_TO"]
            else:
                os.environ["MOSAIC_GPU_DUMP_TO"] = before


def _triton_figures_in(folder: Path) -> Iterator[tuple[str, KernelFigures]]:
    """Yields the kernels of a program that XLA has dumped to a folder."""
    (launches,) = folder.glob("*.thunk_sequence.txt")
    shared = dict(
        re.findall(r"(paged_attention_\w+) grid.*shared_memory: (\d+) bytes", launches.read_text())
    )
    for listing in sorted(folder.glob("*.ptx")):
        text = listing.read_text()
        entry = re.search(r"\.entry (paged_attention_\w+)", text)
        if entry is None:
            continue  # a fusion
        arch = re.search(r"\.target (\w+)", text)
        assert arch is not None, text
        command = ["ptxas", "-v", f"-arch={arch[1]}", str(listing), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = re.search(r"Used (\d+) registers", said)
        assert registers is not None, said
        yield (
            entry[1],
            KernelFigures(
                registers=int(registers[1]),
                spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
                shared_bytes=int(shared[entry[1]]),
            ),
        )


def _figures_in(folder: Path) -> Iterator[tuple[str, KernelFigures]]:
    """Yields the kernels whose listings are in a folder."""
    for listing in sorted(folder.glob("*.ptxas")):
        text = listing.read_text()
        registers = re.search(r"Used (\d+) registers", text)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
        assert registers is not None, text
        name = re.sub(r"_\d+$", "", listing.stem)
        shared = re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", _text(folder, listing.stem))
        yield (
            name,
            KernelFigures(
                registers=int(registers[1]),
                spill_bytes=sum(map(int, spills)) // (2 if "warning" in text else 1),
                shared_bytes=int(shared[0]) if shared else 0,
            ),
        )


def _text(folder: Path, stem: str) -> str:
    return "".join(path.read_text() for path in folder.glob(f"{stem}*.log"))


def rows_of(cases: list[KernelCase]) -> Iterator[tuple[str, bool]]:
    """Compiles the cases. Yields each line of a table, and whether it is as it should be."""
    for case in cases:
        result = compile_kernels(case)
        if result.refusal is not None:
            yield f"{case!s:44} {result.refusal}", False
            continue
        is_in_place = result.alias_bytes >= result.cache_bytes and not result.cache_copies
        figures = "  ".join(
            f"{name.removeprefix('paged_attention_')}: {kernel.registers} registers, "
            f"{kernel.spill_bytes} B spilled, {kernel.shared_bytes} B shared"
            for name, kernel in result.kernels.items()
        )
        yield f"{case!s:44} {'in place' if is_in_place else 'COPIED'}  {figures}", is_in_place


def print_table(targets: Sequence[str] = TARGETS) -> int:
    """Compiles all cases and prints a line for each. Returns the exit status."""
    all_good = True
    for line, is_good in rows_of([case for case in CASES if case.target in targets]):
        print(line, flush=True)
        all_good &= is_good
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(print_table())
