#!/usr/bin/env python
"""Times attention kernels on the device at hand, against what its memory and arithmetic allow.

    python scripts/bench_kernels.py --backend gpu reference --dtype bfloat16

Needs jax, flax and numpy, and a device that the backend runs on; nothing is installed or fetched.
Each time is of one layer, from a program that attends many times in a row with the cache in place.
"share" is the bound over the time: keys and values read at the measured copy bandwidth for decode,
products at the measured matrix rate for prefill.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, with nothing installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from pallas_kernels.ragged_paged_attention import (  # noqa: E402
    Backend,
    LayerCache,
    layout_for,
    ragged_paged_attention,
)
from scripts.device_limits import measured_limits, seconds_of  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The heads of one layer, and how its pages are kept."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str  # of keys and values


@dataclass(frozen=True, kw_only=True)
class Work:
    """One batch: so many sequences, each with `q_len` new tokens at the end of its context."""

    sequences: int
    q_len: int
    kv_len: int

    @property
    def label(self) -> str:
        """How the table calls it."""
        kind = "decode" if self.q_len == 1 else f"prefill {self.q_len}"
        return f"{kind:13} x{self.sequences:<4} context {self.kv_len}"

    def bytes_of(self, shape: Shape) -> int:
        """Bytes of keys and values that have to be read once."""
        row = 2 * shape.kv_heads * shape.head_dim * jnp.dtype(shape.dtype).itemsize
        return self.sequences * self.kv_len * row

    def flops_of(self, shape: Shape) -> int:
        """Multiplications and additions of the pairs that the causal mask leaves."""
        hidden = self.kv_len - self.q_len
        pairs = self.sequences * (self.q_len * hidden + self.q_len * (self.q_len + 1) // 2)
        return 4 * pairs * shape.heads * shape.head_dim


WORK = (
    *(Work(sequences=n, q_len=1, kv_len=1024) for n in (1, 16, 64, 256)),
    *(Work(sequences=n, q_len=1, kv_len=4096) for n in (1, 16, 64)),
    Work(sequences=1, q_len=2048, kv_len=2048),
    Work(sequences=1, q_len=2048, kv_len=8192),
    Work(sequences=8, q_len=256, kv_len=1280),
)


def time_of(backend: Backend, shape: Shape, work: Work, num_loops: int) -> float:
    """Returns the seconds of one layer's attention, its write of new keys and values included."""
    layout = layout_for(
        backend,
        page_size=shape.page_size,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=jnp.dtype(shape.dtype),
    )
    pages_per_sequence = -(-work.kv_len // shape.page_size)
    num_pages = work.sequences * pages_per_sequence
    tokens = work.sequences * work.q_len
    order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    tables = (
        jnp.full((work.sequences,), work.kv_len, jnp.int32),
        jnp.asarray(order.reshape(work.sequences, pages_per_sequence)),
        jnp.arange(work.sequences + 1, dtype=jnp.int32) * work.q_len,
        jnp.array([work.sequences if work.q_len == 1 else 0, work.sequences], jnp.int32),
    )
    activations = jnp.bfloat16
    new = jnp.ones((tokens, shape.kv_heads, shape.head_dim), activations)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(q: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        def layer(
            _: jax.Array, carry: tuple[jax.Array, LayerCache]
        ) -> tuple[jax.Array, LayerCache]:
            out, cache = ragged_paged_attention(
                carry[0], new, new, carry[1], *tables, backend=backend, scale=shape.head_dim**-0.5
            )
            return out.astype(activations), cache

        return lax.fori_loop(0, num_loops, layer, (q, cache))

    q = jnp.ones((tokens, shape.heads, shape.head_dim), activations)
    cache = tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in layout.shapes(num_pages))

    def once() -> jax.Array:
        nonlocal cache
        out, cache = run(q, cache)
        return out

    return seconds_of(once) / num_loops


def rows(
    backends: list[Backend], shape: Shape, num_loops: int, limits: tuple[float, float]
) -> Iterator[str]:
    """Yields a line of the table for each batch and backend."""
    bandwidth, rate = limits
    for work in WORK:
        for backend in backends:
            start = f"{work.label:34} {backend:10}"
            try:
                seconds = time_of(backend, shape, work, num_loops)
            except (ValueError, jax.errors.JaxRuntimeError) as error:
                yield f"{start} {str(error).splitlines()[0][:120]}"
                continue
            bound = max(work.bytes_of(shape) / bandwidth, work.flops_of(shape) / rate)
            yield (
                f"{start} {seconds * 1e6:10.1f} {work.bytes_of(shape) / seconds / 1e9:9.1f} "
                f"{work.flops_of(shape) / seconds / 1e12:9.2f} {bound / seconds:7.1%}"
            )


def main() -> int:
    """Prints the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", nargs="+", choices=get_args(Backend), default=["reference"])
    parser.add_argument("--dtype", default="bfloat16", help="of keys and values")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--loops", type=int, default=16, help="layers in one program")
    options = parser.parse_args()
    shape = Shape(
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        page_size=options.page_size,
        dtype=options.dtype,
    )
    limits = measured_limits()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {shape}")
    print(f"measured: copies {limits[0] / 1e9:.0f} GB/s, products {limits[1] / 1e12:.1f} Tflop/s")
    print(f"{'batch':34} {'backend':10} {'us':>10} {'GB/s':>9} {'Tflop/s':>9} {'share':>7}")
    for line in rows(options.backend, shape, options.loops, limits):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
