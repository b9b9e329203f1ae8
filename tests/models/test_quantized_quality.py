"""What quantising costs on real weights: perplexity of a text, against the same in float32."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxserve.models.checkpoint import resolve, tokenizer_files
from tests.models.forward import FLOAT32, logits_of

pytestmark = pytest.mark.slow

# Paragraphs of Carroll, Austen, Melville, Doyle, Lincoln, Darwin and Dickens.
TEXT = Path(__file__).parent.parent / "data" / "public_domain.txt"


@pytest.fixture(scope="module")
def tokens():
    text = tokenizer_files(resolve("demo")).tokenizer_json
    found = tokenizers.Tokenizer.from_str(text).encode(TEXT.read_text()).ids
    assert len(found) == 1248
    return found


def perplexity(tokens, *, quantization="auto", kv_dtype=FLOAT32):
    logits = logits_of(
        resolve("demo"),
        tokens,
        chunks=(len(tokens),),
        quantization=quantization,
        kv_dtype=jnp.dtype(kv_dtype),
        page_size=64,
    )[:-1].astype(np.float64)
    peak = logits.max(1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(1)) + peak[:, 0]
    return float(np.exp((total - logits[np.arange(len(logits)), tokens[1:]]).mean()))


@pytest.fixture(scope="module")
def exact(tokens):
    value = perplexity(tokens)
    assert 22.4 < value < 22.6  # 22.518
    return value


@pytest.mark.parametrize(
    ("quantization", "measured", "bound"),
    [
        ("int8", 0.003, 0.01),
        ("fp8", 0.025, 0.04),
        # The demo's weights lie on another grid of 4 bits already (GGUF's Q4_1, groups of 32):
        # they are rounded a second time, which costs such a small model dearly.
        ("int4", 0.006, 0.05),
    ],
)
def test_weights_cost_no_more_than_their_bound(tokens, exact, quantization, measured, bound):
    cost = perplexity(tokens, quantization=quantization) / exact - 1
    assert measured / 10 < abs(cost) < bound, cost


@pytest.mark.parametrize(
    ("kv_dtype", "bound"), [("int8", 0.01), ("float8_e4m3fn", 0.025), ("float8_e5m2", 0.07)]
)
def test_kv_caches_cost_no_more_than_their_bound(tokens, exact, kv_dtype, bound):
    cost = perplexity(tokens, kv_dtype=kv_dtype) / exact - 1
    assert 1e-5 < abs(cost) < bound, cost
