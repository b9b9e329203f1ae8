"""The whole engine on a tiny random Llama, in float32, against dense attention in numpy."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.core import CompileCounter, EngineCore
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.errors import ConfigError, PromptTooLong, QueueFull
from tests.checkpoints import write_llama_folder
from tests.dense_llama import DenseLlama
from tests.driving import run, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
CONFIG = EngineConfig(
    dtype="float32",
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=128,
    page_size=4,
)


def prompts_of(count, seed=0, low=3, high=40):
    random = np.random.default_rng(seed)
    return [random.integers(3, 300, random.integers(low, high)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama_folder(tmp_path_factory.mktemp("llama"), seed=1, tied=True)


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return dataclasses.replace(CONFIG, model=str(folder), compile_cache_dir=cache)


@pytest.fixture(scope="module")
def core(config):
    core = EngineCore(config, print)
    yield core
    core.close()


@pytest.fixture(scope="module")
def reference(folder):
    return DenseLlama(folder)


@pytest.fixture(scope="module")
def expected(reference):
    return [reference.greedy(prompt, 24) for prompt in prompts_of(12)]


def test_greedy_tokens_alone_equal_the_reference(core, expected):
    for prompt, tokens in zip(prompts_of(12)[:4], expected, strict=False):
        assert tokens_of(run(core, [prompt], GREEDY)) == [tokens]


@pytest.mark.parametrize("arrive_every", [0, 1, 3])
def test_greedy_tokens_in_a_batch_with_staggered_arrivals_equal_the_reference(
    core, expected, arrive_every
):
    assert tokens_of(run(core, prompts_of(12), GREEDY, arrive_every=arrive_every)) == expected


def test_chunked_prefill_with_few_pages_equals_the_reference(config, expected):
    # Pages for little more than one sequence: preemption all the time.
    small = dataclasses.replace(config, max_num_batched_tokens=7, num_pages=36, max_num_seqs=4)
    core = EngineCore(small, print)
    assert tokens_of(run(core, prompts_of(12), GREEDY)) == expected
    assert core.stats().num_preemptions > 0
    core.close()


def test_prefix_hits_do_not_change_tokens(core, reference):
    start = prompts_of(1, seed=5, low=33, high=34)[0]
    prompts = [[*start, 7], [*start, 8, 9]]
    first = run(core, prompts[:1], GREEDY)[0]
    second = run(core, prompts[1:], GREEDY)[0]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert second.tokens == reference.greedy(prompts[1], 24)


def test_logprobs_are_the_reference_distribution(core, reference):
    prompt = prompts_of(1, seed=6, low=30, high=31)[0]
    params = dataclasses.replace(GREEDY, max_tokens=4, logprobs=5, prompt_logprobs=3)
    answer = run(core, [prompt], params)[0]
    logits = reference.logits(prompt + answer.tokens)
    logits -= logits.max(-1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert answer.prompt_logprobs[0] is None
    reported = [*answer.prompt_logprobs[1:], *answer.logprobs]
    for position, entry in enumerate(reported):
        row = expected[position]
        assert entry.token == (prompt + answer.tokens)[position + 1]
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-4)
        assert entry.rank == 1 + (row > row[entry.token]).sum()
        best = np.argsort(-row)[: len(entry.top)]
        assert [token for token, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], row[best], atol=1e-4)
    assert len(reported) == len(prompt) - 1 + 4
    assert len(answer.prompt_logprobs[1].top) == 3 and len(answer.logprobs[0].top) == 5


SAMPLED = SamplingParams(
    temperature=0.9, top_p=0.95, min_p=0.01, seed=11, max_tokens=24, ignore_eos=True,
    frequency_penalty=0.3, presence_penalty=0.2, repetition_penalty=1.1,
    logit_bias={5: 3.0}, bad_word_tokens=((9,), (10, 11)), min_tokens=5,
)  # fmt: skip


def test_sampled_tokens_do_not_depend_on_batch_chunks_or_preemption(core, config):
    prompts = prompts_of(8, seed=3)
    params = [dataclasses.replace(SAMPLED, seed=index) for index in range(8)]
    alone = [
        run(core, [prompt], one)[0].tokens for prompt, one in zip(prompts, params, strict=True)
    ]
    assert tokens_of(run(core, prompts, params)) == alone
    assert tokens_of(run(core, prompts, params, arrive_every=2)) == alone
    assert len({tuple(tokens) for tokens in alone}) == 8
    small = dataclasses.replace(config, max_num_batched_tokens=7, num_pages=36, max_num_seqs=4)
    other = EngineCore(small, print)
    assert tokens_of(run(other, prompts, params)) == alone
    assert other.stats().num_preemptions > 0
    other.close()


OPTIONS = {
    "temperature": {"temperature": 2.0},
    "seed": {"temperature": 1.5, "seed": 99},
    "top_k": {"temperature": 1.5, "top_k": 1},
    "top_p": {"temperature": 1.5, "top_p": 0.01},
    "min_p": {"temperature": 1.5, "min_p": 0.99},
    "typical_p": {"temperature": 1.5, "typical_p": 0.01},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "logit_bias": {"logit_bias": {17: 100.0}},
    "allowed_token_ids": {"allowed_token_ids": (40, 50, 60)},
    "logprobs": {"logprobs": 20},
    "prompt_logprobs": {"prompt_logprobs": 2},
}


def test_every_option_changes_the_answer_and_nothing_compiles(core):
    prompt = prompts_of(1, seed=8)[0]
    counter = CompileCounter()
    base = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, seed=1)
    plain = run(core, [prompt], base)[0]
    random = run(core, [prompt], dataclasses.replace(base, temperature=1.5))[0]
    for name, values in OPTIONS.items():
        answer = run(core, [prompt], dataclasses.replace(base, **values))[0]
        reference = random if "temperature" in values else plain
        if name in ("logprobs", "prompt_logprobs"):
            assert answer.tokens == plain.tokens
            assert len(getattr(answer, name)) > 0
        else:
            assert answer.tokens != reference.tokens, name
    banned = dataclasses.replace(base, bad_word_tokens=((plain.tokens[0],),))
    assert plain.tokens[0] not in run(core, [prompt], banned)[0].tokens
    pair = dataclasses.replace(base, bad_word_tokens=(tuple(plain.tokens[1:3]),))
    assert run(core, [prompt], pair)[0].tokens[:3] != plain.tokens[:3]
    stopping = dataclasses.replace(base, stop_token_ids=(plain.tokens[4],))
    first = plain.tokens.index(plain.tokens[4])
    assert run(core, [prompt], stopping)[0].tokens == plain.tokens[: first + 1]
    later = dataclasses.replace(stopping, min_tokens=12)
    answer = run(core, [prompt], later)[0].tokens
    assert len(answer) >= 12 and plain.tokens[4] not in answer[:11]
    for count in range(1, 20):  # every bucket
        run(core, prompts_of(count, seed=count), dataclasses.replace(base, max_tokens=3))
    assert counter.count == 0
    counter.close()


def test_a_compilation_would_be_counted():
    counter = CompileCounter()
    jax.jit(lambda x: x * 3 + 1)(np.arange(7, dtype=np.float32)).block_until_ready()
    counter.close()
    assert counter.count > 0


def test_each_token_costs_one_dispatch(core):
    before = core.stats().num_steps
    run(core, [prompts_of(1)[0]], dataclasses.replace(GREEDY, max_tokens=20))
    assert core.stats().num_steps - before == 20


def test_nothing_but_the_blob_is_moved_implicitly(core):
    with jax.transfer_guard("disallow"):
        run(core, prompts_of(3), GREEDY)


def test_a_step_is_dispatched_before_the_last_one_is_read(core, monkeypatch):
    log = []
    runner = core._runner
    dispatch, read = runner.dispatch, runner.read
    monkeypatch.setattr(
        runner, "dispatch", lambda *args: (log.append("dispatch"), dispatch(*args))[1]
    )
    monkeypatch.setattr(runner, "read", lambda pending: (log.append("read"), read(pending))[1])
    run(core, [prompts_of(1)[0]], dataclasses.replace(GREEDY, max_tokens=4))
    assert log == ["dispatch", "dispatch", "read", "dispatch", "read", "dispatch", "read", "read"]


def test_a_stop_token_ends_one_step_late_and_the_extra_token_is_dropped(core):
    prompt = prompts_of(1)[0]
    plain = run(core, [prompt], GREEDY)[0].tokens
    stop = dataclasses.replace(GREEDY, stop_token_ids=(plain[3],))
    before = core.stats().num_steps
    answer = run(core, [prompt], stop)[0]
    end = plain.index(plain[3]) + 1
    assert (answer.tokens, answer.finish_reason) == (plain[:end], "stop")
    assert core.stats().num_steps - before == end + 1


def test_an_aborted_request_frees_its_pages_before_the_next_plan(core):
    core.add(Request(request_id="a", prompt_tokens=(5, 6, 7), params=GREEDY))
    core.step()
    core.step()
    assert core.stats().num_pages_free < core.info.num_pages
    core.abort(["a", "unknown"])
    assert core.stats().num_pages_free == core.info.num_pages
    while core.has_work:
        assert core.step() == []


def test_requests_that_cannot_run_are_refused(core):
    with pytest.raises(PromptTooLong, match="128"):
        core.add(Request(request_id="long", prompt_tokens=(1,) * 128))
    limit = core.max_waiting + 2 * core.info.max_num_seqs
    for index in range(limit):
        core.add(Request(request_id=str(index), prompt_tokens=(1,)))
    with pytest.raises(QueueFull, match=str(limit)):
        core.add(Request(request_id="full", prompt_tokens=(1,)))
    core.abort([str(index) for index in range(limit)])


def test_too_few_pages_are_refused_with_the_numbers(config):
    with pytest.raises(ConfigError, match="31 KV pages.*needs 32.*124"):
        EngineCore(dataclasses.replace(config, num_pages=31), print)
