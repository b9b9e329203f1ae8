"""The offline API on the real engine, with a tiny model."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest

from jaxserve import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from jaxserve.errors import RequestError
from tests.checkpoints import write_llama_folder
from tests.dense_llama import DenseLlama

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
OPTIONS = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "block_size": 4,
    "max_logprobs": -1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama_folder(tmp_path_factory.mktemp("llama"), seed=2)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return {**OPTIONS, "compile_cache_dir": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def llm(folder, options):
    with LLM(str(folder), **options) as llm:
        yield llm


def is_idle(llm):
    stats = llm._client.stats()
    return stats.num_pages_free == stats.num_pages


def test_greedy_answers_are_the_references(llm, folder):
    reference = DenseLlama(folder)
    prompts = [[5, 6, 7], [9] * 20, [40, 41]]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    expected = [reference.greedy(prompt, 8) for prompt in prompts]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)


def test_structured_outputs_shape_the_answers(llm):
    def kept(**outputs):
        options = {"temperature": 1.0, "seed": 1, "max_tokens": 60, "n": 3}
        return SamplingParams(structured_outputs=StructuredOutputsParams(**outputs), **options)

    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    params = [kept(choice=["yes", "no"]), kept(regex="[0-9]{4}"), GREEDY, kept(json=schema)]
    free = llm.generate("hello", GREEDY, use_tqdm=False)[0].outputs[0].text
    outputs = llm.generate(["hello"] * 4, params, use_tqdm=False)
    choices, digits, plain, objects = [[one.text for one in each.outputs] for each in outputs]
    assert set(choices) <= {"yes", "no"} and plain == [free]
    assert all(len(text) == 4 and text.isdigit() for text in digits)
    assert all(json.loads(text)["a"] in (1, 2) for text in objects)
    assert is_idle(llm)


def test_a_grammar_that_cannot_be_is_refused_before_anything_runs(llm):
    steps = llm._client.stats().num_steps
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(grammar="start: nowhere"))
    with pytest.raises(RequestError, match="nowhere"):
        llm.generate(["hello"] * 2, [GREEDY, bad], use_tqdm=False)
    assert llm._client.stats().num_steps == steps and is_idle(llm)


def test_samples_of_one_prompt_differ_and_chat_answers(llm):
    params = SamplingParams(temperature=1.5, max_tokens=8, n=3, seed=1, prompt_logprobs=1)
    output = llm.generate("hello", params, use_tqdm=False)[0]
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 3
    assert output.prompt_logprobs[0] is None
    chat = llm.chat([{"role": "user", "content": "hello"}], GREEDY, use_tqdm=False)[0]
    assert len(chat.outputs[0].token_ids) == 8


def logprobs_after(reference: DenseLlama, tokens: list[int]) -> np.ndarray:
    row = reference.logits(tokens)[-1]
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def test_all_logprobs_and_listed_ones_are_the_references(llm, folder):
    expected = logprobs_after(DenseLlama(folder), [5, 6, 7])
    params = [
        SamplingParams(temperature=0, max_tokens=1, logprobs=-1),
        # The bias bends the choice and not what is told.
        SamplingParams(
            max_tokens=1, logprobs=0, logprob_token_ids=[9, 3, 250], logit_bias={3: -5.0, 77: 100.0}
        ),
    ]
    whole, listed = llm.generate([[5, 6, 7]] * 2, params, use_tqdm=False)
    (told,) = whole.outputs[0].logprobs
    assert len(told) == len(expected)
    np.testing.assert_allclose(
        [told[token].logprob for token in range(len(expected))], expected, atol=1e-4
    )
    (told,) = listed.outputs[0].logprobs
    assert list(told) == [77, 9, 3, 250]
    np.testing.assert_allclose(
        [entry.logprob for entry in told.values()], expected[list(told)], atol=1e-4
    )
    assert [entry.rank is None for entry in told.values()] == [False, True, True, True]


def test_beams_are_those_of_the_reference(llm, folder):
    reference = DenseLlama(folder)
    prompt, width = [5, 6, 7], 3
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(4):
        longer = [
            (total + value, [*tokens, token])
            for total, tokens in beams
            for token, value in enumerate(logprobs_after(reference, prompt + tokens))
        ]
        beams = sorted(longer, reverse=True)[:width]
    params = BeamSearchParams(beam_width=width, max_tokens=4, ignore_eos=True)
    (output,) = llm.beam_search({"prompt_token_ids": prompt}, params)
    assert [beam.tokens for beam in output.sequences] == [prompt + tokens for _, tokens in beams]
    for beam, (total, _) in zip(output.sequences, beams, strict=True):
        assert beam.cum_logprob == pytest.approx(total, abs=1e-3)
    assert is_idle(llm)


def test_more_requests_than_slots_and_queue_all_finish(llm):
    outputs = llm.generate([[index % 300] for index in range(150)], GREEDY, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8] * 150
    assert is_idle(llm)


def test_it_works_inside_a_running_event_loop(llm):
    async def notebook():
        return llm.generate([[3, 4]], GREEDY, use_tqdm=False)

    assert len(asyncio.run(notebook())) == 1


def test_ctrl_c_frees_the_pages(llm, monkeypatch):
    import _thread

    endless = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
    timer = threading.Timer(0.1, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[3]] * 200, endless, use_tqdm=False)
    deadline = time.monotonic() + 5
    while not is_idle(llm) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_idle(llm)
    assert len(llm.generate([[3, 4]], GREEDY, use_tqdm=False)) == 1


def test_a_second_llm_starts_from_the_stored_programs(llm, folder, options):
    from jaxserve.engine.core import CompileCounter

    counter = CompileCounter()
    with LLM(str(folder), **options) as other:
        steps = counter.count
        first = other.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0]
    counter.close()
    assert first.outputs[0].token_ids == (
        llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    )
    # Only the zeroed state is compiled anew: one program, not one for each bucket.
    assert steps <= 2
