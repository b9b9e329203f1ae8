#!/usr/bin/env python
"""Compiles the step program for devices that are not here, and checks what the compilers made.

    .venv/bin/python scripts/compile_targets.py --target v6e --model llama-3.1-8b

Targets are TPUs (`libtpu`) and NVIDIA GPUs (`jax-cuda13-plugin` and `ptxas`); `scripts/test`
installs their compilers into the virtual environment. No weights are read and no program runs. A
program passes if it compiles, updates the whole device state in place, computes nothing in float64,
holds no call to the host and, on one device, no collective. The exit status is 1 if any does not.
"""

from __future__ import annotations

import argparse
import itertools
import math
import operator
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for scripts.model_shapes

import jax

from jaxserve.config import EngineConfig, from_table
from jaxserve.engine.abstract import AbstractEngine, abstract_engine
from jaxserve.engine.runner import Bucket
from jaxserve.mesh import parse_mesh
from jaxserve.models.loading import AbstractModel
from jaxserve.ops.quantization import QuantizedWeight
from jaxserve.planning.collectives import Collective, collectives_of
from jaxserve.planning.targets import (
    COMPILER_ENVIRONMENT,
    TARGETS,
    compiler_options,
    devices_of,
)
from scripts.model_shapes import MODELS

MAX_MODEL_LEN = 8192
NUM_PAGES = 1024


# Weights alone fill the device: such a model needs a mesh.
TOO_LARGE = {
    ("v5e", "llama-3.1-8b"): "15 GiB of weights, 16 GB of memory",
    ("v5e", "qwen3-32b"): "61 GiB of weights, 16 GB of memory",
    ("v6e", "qwen3-32b"): "61 GiB of weights, 32 GB of memory",
    ("v5e", "qwen3-30b-a3b"): "57 GiB of weights, 16 GB of memory",
    ("v6e", "qwen3-30b-a3b"): "57 GiB of weights, 32 GB of memory",
    ("v5e", "gemma-3-27b"): "50 GiB of weights, 16 GB of memory",
    ("v6e", "gemma-3-27b"): "50 GiB of weights, 32 GB of memory",
}

TOO_LARGE |= {
    (target, model): f"{size} GiB of weights, 24 GB of memory"
    for target in ("a10", "l4")
    for model, size in (("qwen3-32b", 61), ("qwen3-30b-a3b", 57), ("gemma-3-27b", 50))
}

KERNEL_CALLS = r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*|__gpu\$xla\.gpu\.triton)"'
_FORBIDDEN = {
    "float64": r"\bf64\[",
    "a call to the host": r" (infeed|outfeed|send|recv)\(|_callback|HostExecute",
}


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled step, and what the compiler says of it."""

    bucket: Bucket
    seconds: float  # to lower and compile
    temp_bytes: int
    alias_bytes: int  # of arguments that results overwrite
    argument_bytes: int
    peak_bytes: int
    state_bytes: int  # of DeviceState
    num_state_copies: int  # of whole KV arrays
    num_dense_weights: int  # float copies of whole quantised matrices
    num_kernels: int  # calls of Pallas kernels
    collectives: Counter[Collective]
    faults: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a target."""

    target: str
    model: str
    num_layers: int | None = None  # None: all
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    mesh: str = "1"
    max_num_seqs: int | None = None  # of each rank; None: the target's default


def named_buckets(engine: AbstractEngine) -> dict[str, Bucket]:
    """Returns the largest bucket of one-token steps and the largest of all."""
    decode = max(bucket for bucket in engine.buckets if bucket[0] == bucket[1])
    return {"decode": decode, "mixed": max(engine.buckets)}


def compile_case(case: Case, bucket_name: str) -> Program:
    """Compiles the step of a model for a target's devices, and inspects it."""
    mesh = parse_mesh(case.mesh)
    hf_config = dict(MODELS[case.model])
    hf_config["num_hidden_layers"] = case.num_layers or hf_config["num_hidden_layers"]
    config = from_table(
        EngineConfig,
        {
            "model": case.model,
            "max_model_len": MAX_MODEL_LEN,
            "quantization": case.quantization,
            "kv_cache_dtype": case.kv_cache_dtype,
            "mesh": case.mesh,
            "max_num_seqs": case.max_num_seqs or "auto",
        },
    )
    devices = devices_of(case.target, mesh.num_devices)
    started_s = time.monotonic()
    engine = abstract_engine(config, hf_config, devices=devices)
    bucket = named_buckets(engine)[bucket_name]
    options = compiler_options(case.target)
    compiled = engine.lower(bucket, NUM_PAGES).compile(compiler_options=options)
    seconds = time.monotonic() - started_s
    return inspect(
        compiled,
        engine.state(NUM_PAGES),
        bucket,
        seconds,
        is_alone=mesh.num_devices == 1,
        quantized=weights_of(engine.model),
    )


def weights_of(model: AbstractModel) -> list[tuple[int, ...]]:
    """Returns the shapes of the quantised matrices: what a step must not write out as floats."""
    return [
        parameter.dense.shape
        for parameter in model.parameters
        if isinstance(parameter.value, QuantizedWeight)
    ]


def inspect(
    compiled: jax.stages.Compiled,
    state: Any,
    bucket: Bucket,
    seconds: float,
    *,
    is_alone: bool,  # it runs on one device
    quantized: Sequence[tuple[int, ...]] = (),  # shapes of matrices
) -> Program:
    """Returns the sizes of a compiled step, and its faults."""
    sizes: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    state_bytes = sum(
        math.prod(_device_shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )
    faults = [f"it has {what}" for what, pattern in _FORBIDDEN.items() if re.search(pattern, text)]
    if sizes.alias_size_in_bytes < state_bytes:
        faults.append(f"{sizes.alias_size_in_bytes} of {state_bytes} state bytes are in place")
    collectives = collectives_of(text)
    if is_alone and collectives:
        faults.append(f"one device has {', '.join(sorted({what.kind for what in collectives}))}")
    return Program(
        bucket=bucket,
        seconds=seconds,
        temp_bytes=sizes.temp_size_in_bytes,
        alias_bytes=sizes.alias_size_in_bytes,
        argument_bytes=sizes.argument_size_in_bytes,
        peak_bytes=sizes.peak_memory_in_bytes,
        state_bytes=state_bytes,
        num_state_copies=_count_copies(text, state),
        num_dense_weights=count_dense(text, quantized),
        num_kernels=len(re.findall(KERNEL_CALLS, text)),
        collectives=collectives,
        faults=tuple(faults),
    )


def _device_shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Returns the shape of each device's part."""
    if leaf.sharding is None:
        return leaf.shape
    return leaf.sharding.shard_shape(leaf.shape)


def _count_copies(text: str, state: Any) -> int:
    """Counts copies of an array of the cache's shape: what a step that works in place lacks."""
    shapes = {_device_shape(leaf) for leaf in jax.tree.leaves(state.cache)}
    copies = re.findall(r"= [a-z]+\d+\w*\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    return sum(tuple(map(int, copy.split(","))) in shapes for copy in copies)


def count_dense(text: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """Counts the arrays of a program's memory that hold a whole quantised matrix as floats.

    What is computed within a fusion is never in memory: only what fusions return is.
    """
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.-]+)", text))
    count, is_fused = 0, False
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            is_fused = opened[1] in fused
        array = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (?:bf16|f16|f32)\[([\d,]+)\]", line)
        if array and not is_fused and " parameter(" not in line and " bitcast(" not in line:
            sizes = list(map(int, array[1].split(",")))
            count += any(_is_reshaped(sizes, shape) for shape in set(shapes))
    return count


def _is_reshaped(sizes: list[int], shape: tuple[int, ...]) -> bool:
    """Returns whether dimensions are those of a matrix `[out, in]`, each split further or not."""
    return math.prod(sizes) == math.prod(shape) and shape[0] in itertools.accumulate(
        sizes, operator.mul
    )


def use_compilers() -> None:
    """Puts the compilers that `scripts/test` installed on the paths, and tells them what they must
    know."""
    for name, value in COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    folder = Path(sys.prefix) / "compilers"
    if folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
    if shutil.which("ptxas") is None:
        os.environ["PATH"] = f"{folder / 'nvidia' / 'cu13' / 'bin'}{os.pathsep}{os.environ['PATH']}"


def rows_of(cases: list[Case]) -> Iterator[tuple[str, bool]]:
    """Compiles everything. Yields each line of the table, and whether it is as it should be."""
    for case in cases:
        for bucket in ("decode", "mixed"):
            start = f"{case.target:6} {case.model:13} {bucket:7}"
            reason = TOO_LARGE.get((case.target, case.model))
            if reason and case.num_layers is None:
                yield f"{start} left out: {reason}", True
                continue
            try:
                program = compile_case(case, bucket)
            except Exception as error:  # a compiler may refuse in any way: the table says how
                yield f"{start} {type(error).__name__}: {str(error).splitlines()[0][:200]}", False
                continue
            yield f"{start} {_line(program)}", not program.faults


def _line(program: Program) -> str:
    sizes = (
        program.temp_bytes,
        program.alias_bytes,
        program.argument_bytes,
        program.peak_bytes,
    )
    numbers = " ".join(f"{size / 2**20:9.1f}" for size in sizes)
    verdict = "; ".join(program.faults) or "compiled"
    return (
        f"{program.seconds:7.1f} {numbers} {program.num_state_copies:6} "
        f"{program.num_dense_weights:5} {program.num_kernels:7}  {verdict}"
    )


def print_kernels(targets: list[str]) -> int:
    """Prints what the compilers make of each kernel's grid of shapes. Returns the exit status."""
    from scripts.targets import gpu_kernels, tpu_kernels  # they import this file

    tpus = [target for target in targets if TARGETS[target].platform == "tpu"]
    statuses = [tpu_kernels.print_table(tpus)] if tpus else []
    if gpus := [target for target in targets if TARGETS[target].platform == "gpu"]:
        statuses.append(gpu_kernels.print_table(gpus))
    return max(statuses)


def main() -> int:
    """Prints the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="repeat for several")
    parser.add_argument("--model", choices=MODELS, action="append", help="repeat for several")
    parser.add_argument("--quantization", default="auto", help="as `jaxserve serve` takes it")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as `jaxserve serve` takes it")
    parser.add_argument("--mesh", default="1", help="as `jaxserve serve` takes it")
    parser.add_argument("--layers", type=int, help="cut the models to this many layers")
    parser.add_argument(
        "--kernels", action="store_true", help="the attention kernels alone, over a grid of shapes"
    )
    options = parser.parse_args()
    if options.kernels:
        return print_kernels(options.target or list(TARGETS))
    use_compilers()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    cases = [
        Case(
            target=target,
            model=model,
            num_layers=options.layers,
            quantization=options.quantization,
            kv_cache_dtype=options.kv_cache_dtype,
            mesh=options.mesh,
        )
        for target in options.target or TARGETS
        for model in options.model or MODELS
    ]
    print(
        f"{'target':6} {'model':13} {'bucket':7} {'seconds':>7} {'temp MiB':>9} {'alias MiB':>9} "
        f"{'args MiB':>9} {'peak MiB':>9} {'copies':>6} {'dense':>5} "
        f"{'kernels':>7}  verdict"
    )
    all_good = True
    for line, is_good in rows_of(cases):
        print(line, flush=True)
        all_good &= is_good
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
