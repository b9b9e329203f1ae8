#!/usr/bin/env python
"""Times kernels on the device at hand, against what its memory and arithmetic allow.

    python scripts/bench_kernels.py --backend gpu triton reference --dtype bfloat16

Attention first, by every backend asked for; then products with stored weights, in the form that the
device gets and, where that is a kernel, in XLA's; then products of experts.

Needs jax, flax and numpy, and a device that the backend runs on; nothing is installed or fetched.
Each time is of one layer, from a program that attends many times in a row with the cache in place.
"share" is the bound over the time: keys and values read at the measured copy bandwidth for decode,
products at the measured matrix rate for prefill; for products, weights at the one or the other.
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

from jaxserve.ops.linear import linear  # noqa: E402
from jaxserve.ops.quantization import (  # noqa: E402
    Fused,
    QuantizedWeight,
    form_for,
    kernel_refusal,
    multiplies_natively,
)
from pallas_kernels.grouped_matmul import grouped_matmul  # noqa: E402
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


# Type, columns that share a scale (None: all of a row), and whether there are zeros.
WEIGHTS: dict[str, tuple[str, int | None, bool]] = {
    "bfloat16": ("bfloat16", None, False),
    "int8": ("int8", None, False),
    "float8": ("float8_e4m3fn", None, False),
    "float8 by 128": ("float8_e4m3fn", 128, False),
    "int4 by 32": ("int4", 32, True),
}
PRODUCT_ROWS = (16, 64, 256, 2048)
_NUM_WEIGHTS = 4  # that follow each other in a program: what one needs is not left from the last


def weights_of(name: str, size: int) -> Iterator[tuple[str, list[jax.Array | QuantizedWeight]]]:
    """Yields how square matrices of a kind may be multiplied, and some of them."""
    dtype, columns, has_zero = WEIGHTS[name]
    keys = jax.random.split(jax.random.key(0), _NUM_WEIGHTS)
    if columns is None and dtype == "bfloat16":
        yield "XLA", [jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys]
        return
    device, groups = jax.devices()[0], size // (columns or size)
    form = form_for(
        device.platform,
        is_native=multiplies_natively(device, jnp.dtype(dtype)),
        has_kernel=kernel_refusal(
            device,
            jnp.dtype(dtype),
            dense_dtype=jnp.dtype(jnp.bfloat16),
            out_size=size,
            in_size=size,
            num_groups=groups,
        )
        is None,
        activations="float",
        num_groups=groups,
        has_zero=has_zero,
        in_size=size,
    )
    data = [jax.random.randint(key, (size, size), -8, 8, jnp.int8).astype(dtype) for key in keys]
    scale = jnp.full((groups, size), 0.1, jnp.float32)
    zero = jnp.ones((groups, size), jnp.int8) if has_zero else None
    # Where that is a kernel, beside what stands in for it.
    for way in dict.fromkeys((form, getattr(form, "otherwise", Fused()))):
        weights = [QuantizedWeight(data=one, scale=scale, zero=zero, form=way) for one in data]
        yield type(way).__name__, list(weights)


def product_lines(size: int, limits: tuple[float, float]) -> Iterator[str]:
    """Yields a line for each kind of weight, way to multiply and number of rows."""
    bandwidth, rate = limits

    @jax.jit
    def run(x: jax.Array, weights: list[jax.Array | QuantizedWeight]) -> jax.Array:
        for weight in weights:
            x = linear(x, weight) * jnp.bfloat16(0.01)
        return x

    for name in WEIGHTS:
        for way, weights in weights_of(name, size):
            num_bytes = sum(
                leaf.size * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize)
                for leaf in jax.tree.leaves(weights[0])
            )
            for count in PRODUCT_ROWS:
                x = jnp.ones((count, size), jnp.bfloat16)
                seconds = seconds_of(functools.partial(run, x, weights)) / _NUM_WEIGHTS
                flops = 2 * count * size * size
                bound = max(num_bytes / bandwidth, flops / rate)
                yield (
                    f"{f'{name}, {count} rows':34} {way:10} {seconds * 1e6:10.1f} "
                    f"{num_bytes / seconds / 1e9:9.1f} {flops / seconds / 1e12:9.2f} "
                    f"{bound / seconds:7.1%}"
                )


def expert_lines(size: int, limits: tuple[float, float]) -> Iterator[str]:
    """Yields a line for each way to multiply by 32 experts' matrices, and number of rows."""
    bandwidth, rate = limits
    groups, out = 32, size // 2
    matrices = jax.random.normal(jax.random.key(0), (groups, out, size), jnp.bfloat16)
    own = "tpu" if jax.devices()[0].platform == "tpu" else "reference"
    for count in PRODUCT_ROWS:
        lhs = jnp.ones((max(count, groups), size), jnp.bfloat16)
        sizes = jnp.full((groups,), lhs.shape[0] // groups, jnp.int32)
        ways = {
            own: jax.jit(functools.partial(grouped_matmul, backend=own)),
            "ragged_dot": jax.jit(lambda x, y, n: lax.ragged_dot(x, y.swapaxes(1, 2), n)),
        }
        for way, run in ways.items():
            seconds = seconds_of(functools.partial(run, lhs, matrices, sizes))
            num_bytes, flops = matrices.size * 2, 2 * lhs.shape[0] * out * size
            bound = max(num_bytes / bandwidth, flops / rate)
            yield (
                f"{f'{groups} experts, {lhs.shape[0]} rows':34} {way:10} {seconds * 1e6:10.1f} "
                f"{num_bytes / seconds / 1e9:9.1f} {flops / seconds / 1e12:9.2f} "
                f"{bound / seconds:7.1%}"
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
    parser.add_argument("--matrix-size", type=int, default=4096, help="of products; 0: none")
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
    if options.matrix_size:
        for lines in (product_lines, expert_lines):
            for line in lines(options.matrix_size, limits):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
