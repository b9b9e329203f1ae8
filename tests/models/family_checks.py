"""The checks that every family of `tests.families` passes, for its own test file to call."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxserve import LLM, SamplingParams
from tests.dense_families import DenseFamily
from tests.models.forward import Forward, logits_of
from tests.models.oracle import Oracle, assert_close

_RANDOM = np.random.default_rng(0)
PROMPTS = tuple(_RANDOM.integers(3, 300, count).tolist() for count in (40, 23, 6))
NUM_TOKENS = 64


def chunks_of(count: int) -> tuple[int, ...]:
    """Returns a prefill of half the tokens, four at a time, and one token at a time after it."""
    return (4,) * (count // 8) + (1,) * (count - count // 8 * 4)


def assert_matters(first: Path, second: Path) -> None:
    """Asserts that two folders differ in logits by far more than the checks allow."""
    first_logits, second_logits = (DenseFamily(path).logits(PROMPTS[0]) for path in (first, second))
    assert np.abs(first_logits - second_logits).max() > 1e-2 * np.abs(first_logits).max()


def assert_dense(folder: Path) -> None:
    """Asserts that the folder computes what numpy does."""
    tokens = PROMPTS[0]
    actual = logits_of(folder, tokens, chunks=chunks_of(len(tokens)))
    assert_close(actual, DenseFamily(folder).logits(tokens))


def assert_transformers_logits(folder: Path, twin: Path | None = None) -> None:
    """Asserts the logits of each prompt, prefilled and decoded, and of one prefilled at once."""
    oracle = Oracle(folder)
    forward = Forward(twin or folder, max_tokens=max(map(len, PROMPTS)))
    for tokens in PROMPTS:
        actual = forward.logits(tokens, chunks=chunks_of(len(tokens)))
        assert_close(actual, oracle.logits(tokens))
    actual = forward.logits(PROMPTS[0], chunks=(len(PROMPTS[0]),))
    assert_close(actual, oracle.logits(PROMPTS[0]))


def assert_transformers_tokens(folder: Path, cache: Path, twin: Path | None = None) -> None:
    """Asserts the greedy answers of the engine to all prompts in one batch."""
    oracle = Oracle(folder)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(
        str(twin or folder),
        dtype="float32",
        max_num_seqs=2,
        max_num_batched_tokens=8,
        max_model_len=128,
        page_size=4,
        compile_cache_dir=str(cache),
    ) as llm:
        outputs = llm.generate([list(prompt) for prompt in PROMPTS], params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == oracle.greedy(prompt, NUM_TOKENS)
