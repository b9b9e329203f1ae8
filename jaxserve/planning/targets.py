"""Devices that are compiled for without having one: their topologies, and what makers publish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
from jax.experimental import topologies

from jaxserve.errors import ConfigError

# What compilers read of the environment, for `os.environ` before their first use. Else the TPU's
# looks for the machine that it is on, complains at length of none, and lets one process in at a
# time, as if each had the TPU to itself.
COMPILER_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

GIB = 2**30
# By number of devices, of any GPU.
_GPU_TOPOLOGIES = {1: "1x1x1", 2: "1x1x2", 4: "1x1x4", 8: "1x1x8"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device. Rates are of one device: JAX counts two in each chip of a 7x."""

    platform: Literal["tpu", "gpu"]
    topologies: dict[int, str]  # by number of devices: what its compiler calls them
    memory_bytes: int  # what the compiler lets a program use
    flops: float  # a second, in bfloat16
    flops_8bit: float  # a second, in int8 or float8, whichever it multiplies faster
    memory_rate: float  # bytes a second
    link_rate: float  # bytes a second out of a device, all its links together


TARGETS = {
    "v5e": Target(
        platform="tpu",
        topologies={4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8"},
        memory_bytes=int(15.75 * GIB),
        flops=197e12,
        flops_8bit=394e12,
        memory_rate=819e9,
        link_rate=200e9,
    ),
    "v6e": Target(
        platform="tpu",
        topologies={4: "v6e:2x2", 8: "v6e:2x4", 16: "v6e:4x4", 32: "v6e:4x8", 64: "v6e:8x8"},
        memory_bytes=int(31.25 * GIB),
        flops=918e12,
        flops_8bit=1836e12,
        memory_rate=1640e9,
        link_rate=448e9,
    ),
    "v5p": Target(
        platform="tpu",
        topologies={4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4"},
        memory_bytes=int(95.74 * GIB),
        flops=459e12,
        flops_8bit=918e12,
        memory_rate=2765e9,
        link_rate=600e9,
    ),
    "7x": Target(
        platform="tpu",
        topologies={8: "tpu7x:2x2x1", 16: "tpu7x:2x2x2", 32: "tpu7x:2x2x4"},
        memory_bytes=int(94.75 * GIB),
        flops=1153e12,
        flops_8bit=2307e12,
        memory_rate=3690e9,
        link_rate=600e9,
    ),
    "h100": Target(
        platform="gpu",
        topologies=_GPU_TOPOLOGIES,
        memory_bytes=int(79.1 * GIB),
        flops=989e12,
        flops_8bit=1979e12,
        memory_rate=3350e9,
        link_rate=450e9,
    ),
    "a100": Target(
        platform="gpu",
        topologies=_GPU_TOPOLOGIES,
        memory_bytes=int(79.1 * GIB),
        flops=312e12,
        flops_8bit=624e12,
        memory_rate=2039e9,
        link_rate=300e9,
    ),
    "a10": Target(
        platform="gpu",
        topologies=_GPU_TOPOLOGIES,
        memory_bytes=int(22 * GIB),
        flops=125e12,
        flops_8bit=250e12,
        memory_rate=600e9,
        link_rate=32e9,
    ),
    "l4": Target(
        platform="gpu",
        topologies=_GPU_TOPOLOGIES,
        memory_bytes=int(22 * GIB),
        flops=121e12,
        flops_8bit=242e12,
        memory_rate=300e9,
        link_rate=32e9,
    ),
}


def devices_of(name: str, count: int = 1) -> list[jax.Device]:
    """Returns compile-only devices: the fewest of a kind that hold `count`.

    Raises ConfigError where there is no such topology, or its compiler is not installed.
    """
    target = TARGETS[name]
    fitting = [size for size in sorted(target.topologies) if size >= count]
    if not fitting:
        raise ConfigError(f"device {name!r} is known up to {max(target.topologies)}, not {count}")
    topology = target.topologies[fitting[0]]
    try:
        if target.platform == "tpu":
            return list(topologies.get_topology_desc(topology, platform="tpu").devices)
        config = Path(__file__).with_name(f"{name}.txtpb").read_text()
        description = topologies.get_topology_desc(
            name, "cuda", target_config=config, topology=topology
        )
        return list(description.devices)
    except Exception as error:  # whatever a plugin raises, or its absence
        extra = "tpu" if target.platform == "tpu" else "cuda13"
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(
            f"device {name!r} needs its compiler, from pip install 'jaxserve[{extra}]': {reason}"
        ) from error


def compiler_options(name: str) -> dict[str, str | bool]:
    """Returns what a compiler must be told without a device: no candidate can be timed."""
    return {"xla_gpu_autotune_level": "0"} if TARGETS[name].platform == "gpu" else {}
