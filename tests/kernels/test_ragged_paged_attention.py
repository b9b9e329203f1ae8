"""The XLA reference against dense attention in numpy, on scattered pages among junk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import layout_for, ragged_paged_attention
from tests.kernels.ragged_batches import ragged_batch

PAGE_SIZE = 16


def run_case(lens, *, scales=None, sinks=None, **options):
    """Returns (actual, expected) over real rows; `options` are of the batch and of attention."""
    attention = {name: options.pop(name) for name in STATIC_OPTIONS if name in options}
    dtype = options.get("dtype", jnp.float32)
    batch = ragged_batch(lens, page_size=PAGE_SIZE, **options)
    cache = tuple(
        jnp.asarray(side.reshape(*side.shape[:2], -1), dtype) for side in (batch.keys, batch.values)
    )
    if dtype == jnp.bfloat16:
        cache = tuple(jax.lax.bitcast_convert_type(side, jnp.uint16) for side in cache)
    layout = layout_for(
        "reference", page_size=PAGE_SIZE, kv_heads=batch.k.shape[1], head_dim=batch.k.shape[2],
        dtype=jnp.dtype(dtype),
    )  # fmt: skip
    shapes = layout.shapes(len(batch.keys))
    assert [(side.shape, side.dtype) for side in cache] == [(s.shape, s.dtype) for s in shapes]
    out, cache = jax.jit(ragged_paged_attention, static_argnames=STATIC)(
        batch.q, batch.k, batch.v, cache, *batch.tables(), backend="reference", scale=0.25,
        sinks=None if sinks is None else jnp.asarray(sinks, jnp.float32),
        **attention, **(scales or {}),
    )  # fmt: skip
    if scales is None:
        check_cache(cache, batch, dtype)
    return np.asarray(out)[: batch.num_rows], batch.expected(scale=0.25, sinks=sinks, **attention)


def check_cache(cache, batch, dtype):
    """Asserts that the step's rows were written where they belong, and nothing else was."""
    for side, expected in zip(cache, batch.cache_after(), strict=True):
        if dtype == jnp.bfloat16:
            side = jax.lax.bitcast_convert_type(side, jnp.bfloat16)
        actual = np.asarray(side).astype(np.float32).reshape(expected.shape)
        np.testing.assert_array_equal(actual, expected)


STATIC_OPTIONS = ("sliding_window", "soft_cap")
STATIC = ("backend", "scale", *STATIC_OPTIONS)
MIXED = [(1, 1), (1, 16), (1, 17), (1, 300), (2, 2), (16, 16), (17, 33), (130, 400), (5, 290)]


@pytest.mark.parametrize("junk", [1e4, np.nan])
def test_mixed_batch_matches_dense_attention_on_scattered_pages(junk):
    actual, expected = run_case(MIXED, tokens=256, sequences=16, junk=junk)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_decode_batch_matches_dense_attention():
    lens = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 600)]
    actual, expected = run_case(lens, tokens=8, sequences=8)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_full_batch_without_padding_matches_dense_attention():
    actual, expected = run_case([(1, 40)] * 4, tokens=4, sequences=4)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("window", [1, 7, 16, 33, 1000])
def test_sliding_window_matches_dense_attention(window):
    actual, expected = run_case(MIXED, tokens=256, sequences=16, sliding_window=window)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_soft_cap_and_sinks_match_dense_attention():
    sinks = np.array([0.5, -1.0, 2.0, 0.0])
    actual, expected = run_case(MIXED, tokens=256, sequences=16, soft_cap=2.0, sinks=sinks)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(9, 3, 64), (8, 1, 80), (4, 4, 96), (8, 2, 128)]
)
def test_head_shapes_match_dense_attention(heads, kv_heads, head_dim):
    actual, expected = run_case(
        MIXED, tokens=256, sequences=16, heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )
    np.testing.assert_allclose(actual, expected, atol=5e-5)


def test_bfloat16_cache_stays_within_its_rounding():
    actual, expected = run_case(MIXED, tokens=256, sequences=16, dtype=jnp.bfloat16)
    np.testing.assert_allclose(actual, expected, atol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8], ids=str)
def test_8_bit_caches_stay_within_the_rounding_of_queries_and_weights(dtype):
    junk = 1e2 if dtype == jnp.int8 else np.nan
    actual, expected = run_case(MIXED, tokens=256, sequences=16, dtype=dtype, junk=junk)
    np.testing.assert_allclose(actual, expected, atol=0.05)


@pytest.mark.parametrize(
    ("dtype", "largest", "scale", "stored"),
    [
        (jnp.int8, 127, 1.0, {2.6: 3, -2.6: -3, 2.5: 2}),
        (jnp.int8, 127, 0.5, {2.6: 5, 1.0: 2}),
        (jnp.float8_e4m3fn, 448, 1.0, {2.6: 2.5, 0.3: 0.3125}),
        (jnp.float8_e5m2, 57344, 0.5, {2.6: 5, 0.3: 0.625}),
    ],
)
def test_8_bit_caches_round_to_nearest_and_saturate(dtype, largest, scale, stored):
    numbers = [1e9, -1e9, *stored]
    k = jnp.asarray(numbers, jnp.float32)[:, None, None] * jnp.ones((1, 1, 16), jnp.float32)
    tokens = len(numbers)
    pages = jnp.zeros((1, PAGE_SIZE, 16), dtype)
    tables = (
        jnp.array([tokens], jnp.int32), jnp.zeros((1, 1), jnp.int32),
        jnp.array([0, tokens], jnp.int32), jnp.array([0, 1], jnp.int32),
    )  # fmt: skip
    one_scale = jnp.float32(scale)
    _, (keys, values) = ragged_paged_attention(
        k, k, k, (pages, pages), *tables, backend="reference", scale=1.0,
        k_scale=one_scale, v_scale=one_scale,
    )  # fmt: skip
    for side in (keys, values):
        rows = np.asarray(side)[0, :tokens, 0].astype(np.float32).tolist()
        least = -128 if dtype == jnp.int8 else -largest
        assert rows == [largest, least, *stored.values()]
        assert not np.asarray(side)[0, tokens:].any()


def test_pages_of_another_type_are_refused():
    layout = layout_for(
        "reference", page_size=16, kv_heads=1, head_dim=16, dtype=jnp.dtype(jnp.float16)
    )
    with pytest.raises(ValueError, match="cannot be float16; they can be float32, bfloat16, flo"):
        layout.shapes(1)


def test_scales_of_keys_and_values_are_undone():
    scales = {"k_scale": jnp.float32(0.5), "v_scale": jnp.float32(4.0)}
    actual, expected = run_case([(4, 4), (9, 9), (40, 40)], tokens=64, sequences=4, scales=scales)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        call_with_heads(3, kv_heads=2)


def call_with_heads(heads, kv_heads):
    q = jnp.zeros((4, heads, 16), jnp.float32)
    k = jnp.zeros((4, kv_heads, 16), jnp.float32)
    pages = jnp.zeros((2, PAGE_SIZE, kv_heads * 16), jnp.float32)
    one = jnp.zeros(4, jnp.int32)
    return ragged_paged_attention(
        q, k, k, (pages, pages), one, jnp.zeros((4, 2), jnp.int32), jnp.zeros(5, jnp.int32),
        jnp.zeros(2, jnp.int32), backend="reference", scale=1.0,
    )  # fmt: skip
