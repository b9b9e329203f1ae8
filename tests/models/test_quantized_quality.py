"""What quantising costs on real weights: perplexity of a text, against the same in float32."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jaxserve.models.checkpoint import Checkpoint, resolve, tokenizer_files
from tests.models import forward
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
        # The demo's weights are 4 bit already (GGUF's Q4_1, groups of 32): int4 finds their levels.
        ("int4", 0.011, 0.05),
    ],
)
def test_weights_cost_no_more_than_their_bound(tokens, exact, quantization, measured, bound):
    cost = perplexity(tokens, quantization=quantization) / exact - 1
    assert measured / 10 < abs(cost) < bound, cost


class Shuffled:
    """The demo's checkpoint with its channels in another order, which computes the same."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        random = np.random.default_rng(0)
        self._source = checkpoint
        self.config, self.names, self.shape = checkpoint.config, checkpoint.names, checkpoint.shape
        self._hidden = random.permutation(self.config["hidden_size"])
        self._ffw = random.permutation(self.config["intermediate_size"])

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._source.close()

    def read(self, name, index=None):
        """Returns a tensor; `index` must be of all of it."""
        tensor = self._source.read(name)
        for axis, is_output in ((0, True), (-1, False)):
            if order := self._order(name.split(".")[-2], is_output):
                tensor = tensor.take(order[0], axis)
        assert index is None or tensor[index].shape == tensor.shape
        return tensor

    def _order(self, stem, is_output):
        if stem in (("o_proj", "down_proj") if is_output else ("q_proj", "k_proj", "v_proj")):
            return [self._hidden]
        if stem in ("gate_proj", "up_proj"):
            return [self._ffw if is_output else self._hidden]
        if stem == "down_proj":
            return [self._ffw]
        is_hidden = not is_output and (stem == "embed_tokens" or stem.endswith("norm"))
        return [self._hidden] if is_hidden else []


def test_int4_costs_a_small_model_more_off_the_levels_of_its_file(tokens, exact, monkeypatch):
    opened = forward.open_checkpoint
    monkeypatch.setattr(forward, "open_checkpoint", lambda path: Shuffled(opened(path)))
    assert abs(perplexity(tokens) / exact - 1) < 1e-4
    assert 0.05 < perplexity(tokens, quantization="int4") / exact - 1 < 0.25  # a second rounding


@pytest.mark.parametrize(
    ("kv_dtype", "bound"), [("int8", 0.01), ("float8_e4m3fn", 0.025), ("float8_e5m2", 0.07)]
)
def test_kv_caches_cost_no_more_than_their_bound(tokens, exact, kv_dtype, bound):
    cost = perplexity(tokens, kv_dtype=kv_dtype) / exact - 1
    assert 1e-5 < abs(cost) < bound, cost
