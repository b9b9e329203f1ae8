"""The GPU kernels in Mosaic GPU's interpreter against dense attention; on a GPU, compiled.

The interpreter knows no wgmma as the kernels use it: products are `jnp.dot` there. Everything else
(copies, barriers, the ring, masks, splits, the merge) is the code that is compiled.
"""

import dataclasses
import faulthandler
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import gpu, layout_for
from pallas_kernels.ragged_paged_attention.gpu_blocks import Blocks, DecodeBlocks, PrefillBlocks
from tests.kernels.ragged_batches import ragged_batch

MODES = [pytest.param(True, id="interpreted"), pytest.param(False, id="gpu", marks=pytest.mark.gpu)]
HANGS_AFTER_S = 300

# Splits of one block each, so that every merge has several parts.
SPLIT = Blocks(
    decode=DecodeBlocks(programs=16, min_split=1), prefill=PrefillBlocks(warpgroups=2, block_kv=64)
)
MIXED = [(1, 1), (1, 130), (2, 2), (17, 33), (70, 200)]
DECODE = [(1, 1), (1, 15), (1, 64), (1, 65), (1, 300)]


@pytest.fixture(autouse=True)
def interpreter_guard(monkeypatch):
    """Ends the run if a simulated thread waits for ever for one that failed."""
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    compile_threads_once(monkeypatch)
    yield
    faulthandler.cancel_dump_traceback_later()


def compile_threads_once(monkeypatch):
    """Has jax 0.10 compile a simulated thread once, not for each program of the grid."""
    from jax._src.pallas.mosaic.interpret import thread_map

    if not hasattr(thread_map, "_run"):  # later versions do so themselves
        monkeypatch.setattr(thread_map, "_run_jaxpr", run_jaxpr)


def run_jaxpr(jaxpr, consts, *args):
    """Compiles and runs: the jitted function is always the same, so jax's caches hold it."""
    compiled = jax.jit(evaluate, static_argnums=0).trace(jaxpr, consts, *args).lower().compile()
    compiled(consts, *args)


def evaluate(jaxpr, consts, *args):
    jax.core.eval_jaxpr(jaxpr, consts, *args)


def run_case(lens, interpret, *, scales=(None, None), blocks=SPLIT, attention=None, **options):
    """Returns (actual, expected) over real rows; `options` are of the batch."""
    attention = attention or {}
    dtype = jnp.dtype(options.pop("dtype", jnp.bfloat16))
    options = {"heads": 4, "kv_heads": 2, "head_dim": 32, "tokens": 128, "sequences": 8} | options
    is_narrow = dtype.itemsize == 1
    batch = ragged_batch(lens, dtype=jnp.bfloat16 if is_narrow else dtype, **options)
    if is_narrow:
        batch = quantized(batch, dtype, scales)
    sides = zip((batch.keys, batch.values), scales, strict=True)
    cache = tuple(jnp.asarray(codes(side, dtype, scale), dtype) for side, scale in sides)
    layout = layout_for(
        "gpu", page_size=cache[0].shape[1], kv_heads=cache[0].shape[2],
        head_dim=cache[0].shape[3], dtype=dtype,
    )  # fmt: skip
    shapes = layout.shapes(len(batch.keys))
    assert [(side.shape, side.dtype) for side in cache] == [(s.shape, s.dtype) for s in shapes]
    k_scale, v_scale = (None if scale is None else jnp.float32(scale) for scale in scales)
    attend = functools.partial(
        gpu.attend, scale=0.25, k_scale=k_scale, v_scale=v_scale, blocks=blocks,
        interpret=interpret, **attention,
    )  # fmt: skip
    arrays = jax.tree.map(jnp.asarray, (batch.q, batch.k, batch.v, cache, *batch.tables()))
    out, cache = jax.jit(attend, donate_argnums=3)(*arrays)
    for side, expected, scale in zip(cache, batch.cache_after(), scales, strict=True):
        actual = np.asarray(side).astype(np.float32)
        np.testing.assert_array_equal(actual, codes(expected, dtype, scale))
    return np.asarray(out)[: batch.num_rows], batch.expected(scale=0.25, **attention)


def quantized(batch, dtype, scales):
    """Returns the batch with the numbers that scaled pages of `dtype` can hold."""
    return dataclasses.replace(
        batch,
        **{
            name: codes(getattr(batch, name), dtype, scale) * np.float32(scale)
            for name, scale in zip(("k", "keys", "v", "values"), np.repeat(scales, 2), strict=True)
        },
    )


def codes(x, dtype, scale):
    """Returns what pages of `dtype` hold for numbers, as float32; junk stays as bad as can be."""
    if scale is None:
        return x
    x = x / np.float32(scale)
    if dtype == jnp.int8:
        x = np.where(np.isnan(x), 127.0, np.rint(x))
    return x.astype(dtype).astype(np.float32)


def check(actual, expected):
    assert not np.isnan(actual).any()
    np.testing.assert_allclose(actual, expected, atol=0.03, rtol=0.01)


@pytest.mark.parametrize("interpret", MODES)
def test_mixed_batch_matches_dense_attention_among_junk(interpret):
    check(*run_case(MIXED, interpret))


@pytest.mark.parametrize("interpret", MODES)
def test_decode_batch_matches_dense_attention_among_junk(interpret):
    check(*run_case(DECODE, interpret, tokens=8))
