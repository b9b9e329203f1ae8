"""Beam search against trying everything, on models small enough for that."""

import itertools
import math

import httpx2
import numpy as np
import pytest

from jaxserve.beam_search import BeamSearch, BeamSearchParams
from jaxserve.errors import RequestError
from tests.server.serving import EchoServer

VOCAB, EOS = 4, 3


def logprobs_after(tokens: tuple[int, ...]) -> np.ndarray:
    """Returns a distribution that depends on the whole text."""
    logits = np.random.default_rng([7, *tokens]).normal(size=VOCAB)
    return logits - np.log(np.exp(logits).sum())


def search(prompt: tuple[int, ...], params: BeamSearchParams) -> tuple[list, int]:
    """Returns the best beams and the number of steps."""
    beams = BeamSearch(prompt, params, eos_tokens=[EOS], max_model_len=64)
    num_steps = 0
    while prompts := beams.prompts:
        candidates = []
        for tokens in prompts:
            values = logprobs_after(tokens)
            order = np.argsort(-values)[: params.num_candidates]
            candidates.append([(int(token), float(values[token])) for token in order])
        beams.advance(candidates)
        num_steps += 1
    return beams.best(), num_steps


def all_texts(prompt: tuple[int, ...], max_tokens: int, penalty: float) -> list:
    """Returns every text that ends, or is `max_tokens` long, by falling score."""
    found = []
    for length in range(1, max_tokens + 1):
        for text in itertools.product(range(VOCAB), repeat=length):
            ends = text[-1] == EOS
            if EOS in text[:-1] or (not ends and length < max_tokens):
                continue
            total = sum(logprobs_after(prompt + text[:i])[text[i]] for i in range(length))
            scale = (len(prompt) + length - ends) ** penalty
            found.append((total / scale, text))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
def test_a_wide_search_finds_what_trying_everything_finds(penalty):
    for prompt in ((1, 2), (0,), (2, 2, 1)):
        params = BeamSearchParams(beam_width=81, max_tokens=4, length_penalty=penalty)
        beams, _ = search(prompt, params)
        expected = all_texts(prompt, 4, penalty)[:81]
        assert [beam.tokens for beam in beams] == [text for _, text in expected]
        total = sum(
            logprobs_after(prompt + beams[0].tokens[:i])[token]
            for i, token in enumerate(beams[0].tokens)
        )
        assert math.isclose(beams[0].cumulative_logprob, total)


def test_one_beam_is_the_greedy_text():
    beams, _ = search((1,), BeamSearchParams(beam_width=1, max_tokens=5, ignore_eos=True))
    text: tuple[int, ...] = ()
    for _ in range(5):
        text += (int(np.argmax(logprobs_after((1, *text)))),)
    assert beams[0].tokens == text


def test_a_search_ends_early_with_the_same_result():
    params = BeamSearchParams(beam_width=2, max_tokens=40, length_penalty=0.0)
    beams, num_steps = search((1, 2), params)
    assert num_steps < 40
    ended = [beam for beam in beams if beam.has_ended]
    assert len(ended) == 2


def test_the_search_fits_the_context():
    beams = BeamSearch(
        (1,) * 60, BeamSearchParams(beam_width=1, max_tokens=40), eos_tokens=[], max_model_len=64
    )
    for _ in range(4):
        beams.advance([[(1, -1.0), (2, -2.0)]])
    assert beams.prompts == []


def test_odd_parameters_are_refused():
    for name, value in (("beam_width", 0), ("max_tokens", 0), ("length_penalty", math.nan)):
        with pytest.raises(RequestError) as refused:
            BeamSearchParams(**{"beam_width": 1, "max_tokens": 1, name: value})
        assert refused.value.param == name


@pytest.fixture(scope="module")
def http():
    with EchoServer() as server, httpx2.Client(base_url=server.url) as client:
        yield client


def test_completions_and_chat_search_with_beams(http):
    # The echo's k-th likeliest token is the first token of its prompt plus k, at -1 - k; each step
    # asks anew with a longer prompt.
    body = {"prompt": ["ad", "x"], "n": 2, "max_tokens": 2, "use_beam_search": True}
    reply = http.post("/v1/completions", json={**body, "logprobs": 1}).json()
    choices = reply["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        (0, "aa"), (1, "ab"), (2, "xx"), (3, "xy"),
    ]  # fmt: skip
    assert choices[1]["logprobs"]["token_logprobs"] == [-1.0, -2.0]
    assert choices[1]["logprobs"]["top_logprobs"][1] == {"b": -2.0, "a": -1.0}
    assert reply["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11,
        "prompt_tokens_details": None, "completion_tokens_details": None,
    }  # fmt: skip
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 2}
    reply = http.post("/v1/chat/completions", json={**body, "use_beam_search": True}).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["uu", "uv"]
