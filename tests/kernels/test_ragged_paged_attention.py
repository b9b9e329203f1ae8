"""The XLA reference against dense attention in numpy, on scattered pages among junk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import layout_for, ragged_paged_attention

PAGE_SIZE = 16


def dense_attention(q, k, v, *, scale, sliding_window, soft_cap, sinks):
    """Attends in float64: q [q_len, heads, d] at the end of k, v [kv_len, kv_heads, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = np.einsum("qhd,chd->hqc", q, k).astype(np.float64) * scale
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    query = np.arange(len(k) - len(q), len(k))[:, None]
    key = np.arange(len(k))[None, :]
    seen = key <= query
    if sliding_window is not None:
        seen &= key > query - sliding_window
    logits = np.where(seen, logits, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks[:, None, None], (*logits.shape[:2], 1))
        logits = np.concatenate([logits, column], axis=2)
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("hqc,chd->qhd", weight[:, :, : len(k)], v)


def run_case(
    lens, *, tokens, sequences, heads=4, kv_heads=2, head_dim=16, dtype=jnp.float32, junk=np.nan,
    scales=None, **options,
):  # fmt: skip
    """Returns (actual, expected) over real rows; `lens` is [(q_len, kv_len)], ones first."""
    random = np.random.default_rng(0)
    pages_per_sequence = 40
    num_pages = 1 + sum(-(-kv_len // PAGE_SIZE) for _, kv_len in lens)
    order = list(random.permutation(num_pages))
    layout = layout_for(
        "reference", page_size=PAGE_SIZE, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
    )
    shape = layout.shapes(num_pages)[0].shape
    pages = [np.full(shape, junk, np.float32) for _ in range(2)]
    page_table = np.full((sequences, pages_per_sequence), num_pages - 1, np.int32)
    kv_lens = np.zeros(sequences, np.int32)
    cu_q_lens = np.zeros(sequences + 1, np.int32)
    q = random.standard_normal((tokens, heads, head_dim)).astype(np.float32)
    new = [np.zeros((tokens, kv_heads, head_dim), np.float32) for _ in range(2)]
    rounded = lambda x: np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))  # noqa: E731
    expected, row = [], 0
    for index, (q_len, kv_len) in enumerate(lens):
        full = [random.standard_normal((kv_len, kv_heads, head_dim)) for _ in range(2)]
        count = -(-kv_len // PAGE_SIZE)
        page_table[index, :count] = [order.pop() for _ in range(count)]
        for position in range(kv_len - q_len):
            page = page_table[index, position // PAGE_SIZE]
            for side in range(2):
                pages[side][page, position % PAGE_SIZE] = full[side][position].reshape(-1)
        for side in range(2):
            new[side][row : row + q_len] = full[side][kv_len - q_len :]
        kv_lens[index] = kv_len
        cu_q_lens[index + 1] = row + q_len
        k, v = rounded(full[0].astype(np.float32)), rounded(full[1].astype(np.float32))
        arguments = {"sliding_window": None, "soft_cap": None, "sinks": None, **options}
        query = q[row : row + q_len]
        expected.append(dense_attention(query, k, v, scale=0.25, **arguments))
        row += q_len
    cu_q_lens[len(lens) + 1 :] = row
    counts = np.array([sum(q_len == 1 for q_len, _ in lens), len(lens)], np.int32)
    cache = tuple(jnp.asarray(side, dtype) for side in pages)
    if dtype == jnp.bfloat16:
        cache = tuple(jax.lax.bitcast_convert_type(side, jnp.uint16) for side in cache)
    if options.get("sinks") is not None:
        options["sinks"] = jnp.asarray(options["sinks"], jnp.float32)
    out, _ = jax.jit(ragged_paged_attention, static_argnames=STATIC)(
        q, *new, cache, kv_lens, page_table, cu_q_lens, counts,
        backend="reference", scale=0.25, **options, **(scales or {}),
    )  # fmt: skip
    return np.asarray(out)[:row], np.concatenate(expected)


STATIC = ("backend", "scale", "sliding_window", "soft_cap")
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
