"""What the device at hand can do, measured: the bounds that kernels and steps are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_REPEATS = 5


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the shortest of several runs, in seconds, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started_s)
    return min(times)


def copy_bandwidth(num_bytes: int, num_loops: int = 16) -> float:
    """Returns bytes read and written in a second by adding one to an array of `num_bytes`."""
    array = jnp.zeros((num_bytes // 4,), jnp.float32)

    @jax.jit
    def run(array: jax.Array) -> jax.Array:
        return lax.fori_loop(0, num_loops, lambda _, x: x + 1.0, array)

    return 2 * num_bytes * num_loops / seconds_of(lambda: run(array))


def matmul_rate(size: int, num_loops: int = 16) -> float:
    """Returns the flop/s of square bfloat16 products summed in float32."""
    left = jnp.ones((size, size), jnp.bfloat16)

    @jax.jit
    def run(left: jax.Array) -> jax.Array:
        def multiply(_: jax.Array, x: jax.Array) -> jax.Array:
            product = jnp.dot(x, left, preferred_element_type=jnp.float32)
            return (product * (1.0 / size)).astype(jnp.bfloat16)

        return lax.fori_loop(0, num_loops, multiply, left)

    return 2 * size**3 * num_loops / seconds_of(lambda: run(left))


def measured_limits() -> tuple[float, float]:
    """Returns (bytes/s, flop/s) of the first device; a CPU gets work of its own size."""
    is_cpu = jax.devices()[0].platform == "cpu"
    size = 1024 if is_cpu else 8192
    return copy_bandwidth((64 if is_cpu else 1024) * 2**20), matmul_rate(size)
