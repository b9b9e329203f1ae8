import asyncio
import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import jaxserve.llm
from jaxserve import LLM, BeamSearchParams, RepetitionDetection, SamplingParams, generate
from jaxserve.errors import ConfigError, EngineStopped, RequestError
from jaxserve.server.model_text import ModelText
from jaxserve.text.chat_template import ChatTemplate
from tests.fakes import EchoEngine, byte_tokenizer

TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture
def engines(monkeypatch):
    """Puts an EchoEngine with a bytes tokenizer in the place of a model; returns those started."""
    started = []
    tokenizer = byte_tokenizer()
    text = ModelText(
        tokenizer=tokenizer,
        chat_template=ChatTemplate(TEMPLATE, special_tokens=tokenizer.special_tokens),
        defaults={"max_tokens": 3},
    )

    def start(config, deliver):
        options = {"step_s": 0.0, "vocab_size": 260, "max_waiting": 8, **start.options}
        started.append(EchoEngine(deliver, **options))
        return started[-1]

    start.options = {}
    monkeypatch.setattr(jaxserve.llm, "_start_engine", start)
    monkeypatch.setattr(jaxserve.llm, "_load_text", lambda config: text)
    yield started, start.options
    for engine in started:
        engine.close()


def run(llm, prompts, params=None, **options):
    return llm.generate(prompts, params, use_tqdm=False, **options)


def test_beams_come_best_first_with_their_prompt(engines):
    with LLM() as llm:
        params = BeamSearchParams(beam_width=2, max_tokens=2)
        outputs = llm.beam_search(["ad", {"prompt_token_ids": [120]}], params)
        with pytest.raises(RequestError, match="needs 22 logprobs; the limit is 20"):
            llm.beam_search("a", BeamSearchParams(beam_width=11, max_tokens=1))
    assert [[beam.text for beam in output.sequences] for output in outputs] == [
        ["adaa", "adab"],
        ["xxx", "xxy"],
    ]
    beam = outputs[0].sequences[1]
    assert (beam.tokens, beam.cum_logprob, beam.finish_reason) == (
        [97, 100, 97, 98],
        -3.0,
        "length",
    )
    assert [entry[97].logprob for entry in beam.logprobs] == [-1.0, -1.0]


def test_an_answer_that_goes_round_in_circles_ends(engines):
    watch = RepetitionDetection(max_pattern_size=2, min_count=4)
    with LLM() as llm:
        (output,) = run(llm, "ab", SamplingParams(max_tokens=50, repetition_detection=watch))
    sample = output.outputs[0]
    assert (sample.text, sample.finish_reason) == ("abababab", "repetition")


def test_results_come_in_the_order_of_the_prompts(engines):
    params = [SamplingParams(max_tokens=count) for count in (9, 1, 5)]
    with LLM() as llm:
        outputs = run(llm, ["abc", "de", "f"], params)
    assert [output.outputs[0].text for output in outputs] == ["abcabcabc", "d", "fffff"]
    assert [output.prompt for output in outputs] == ["abc", "de", "f"]
    assert [output.prompt_token_ids for output in outputs] == [list(b"abc"), list(b"de"), [102]]
    assert all(
        output.finished and output.outputs[0].finish_reason == "length" for output in outputs
    )


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        ("ab", ["aba"]),
        ([97, 98], ["aba"]),
        ([[97], "b"], ["aaa", "bbb"]),
        ({"prompt": "ab"}, ["aba"]),
        ([{"prompt_token_ids": [97], "prompt": "shown"}, {"prompt": "c"}], ["aaa", "ccc"]),
        ([], []),
    ],
)
def test_prompts_come_in_every_form(engines, prompts, texts):
    with LLM() as llm:
        assert [output.outputs[0].text for output in run(llm, prompts)] == texts


@pytest.mark.parametrize(
    ("prompts", "params", "param"),
    [
        (3, None, "prompts"),
        ([3.5], None, "prompts"),
        ({"text": "a"}, None, "prompts"),
        ({}, None, "prompts"),
        (["a", ""], None, "prompt"),
        (["a"], [SamplingParams(), SamplingParams()], "sampling_params"),
        (["a"], ["b"], "sampling_params"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(engines, prompts, params, param):
    with LLM() as llm:
        with pytest.raises(RequestError) as caught:
            run(llm, prompts, params)
        assert caught.value.param == param
        assert llm._client.stats().num_steps == 0


def test_the_samples_of_a_prompt_come_together(engines):
    with LLM() as llm:
        [output] = run(llm, "abcd", SamplingParams(n=3, max_tokens=2))
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    assert [sample.text for sample in output.outputs] == ["ab", "ab", "ab"]


def test_a_stop_string_aborts_the_sequence_in_the_engine(engines):
    started, options = engines
    options.update(step_s=0.001, max_model_len=100_000)
    with LLM() as llm:
        [output] = run(llm, "abcd", SamplingParams(max_tokens=90_000, stop="cd"))
        assert started[0].aborted == ["0"]
    sample = output.outputs[0]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("ab", "stop", "cd")


def test_logprobs_have_vllms_form(engines):
    with LLM() as llm:
        params = SamplingParams(max_tokens=2, logprobs=2, prompt_logprobs=1)
        [output] = run(llm, "ab", params)
    sample = output.outputs[0]
    assert [
        set(position) >= {token} for position, token in zip(sample.logprobs, b"ab", strict=True)
    ]
    assert sample.logprobs[0][97].decoded_token == "a" and sample.logprobs[0][97].rank == 1
    assert sample.cumulative_logprob == pytest.approx(
        sum(position[token].logprob for position, token in zip(sample.logprobs, b"ab", strict=True))
    )
    assert output.prompt_logprobs[0] is None and 98 in output.prompt_logprobs[1]


def test_far_more_prompts_than_the_queue_holds_all_finish(engines):
    prompts = [chr(97 + index % 26) for index in range(2000)]
    with LLM() as llm:
        outputs = run(llm, prompts, SamplingParams(max_tokens=2))
    assert [output.outputs[0].text for output in outputs] == [prompt * 2 for prompt in prompts]


def test_several_threads_share_an_engine(engines):
    results = {}
    with LLM() as llm:

        def ask(letter):
            outputs = run(llm, [letter] * 50, SamplingParams(max_tokens=4))
            results[letter] = {output.outputs[0].text for output in outputs}

        threads = [threading.Thread(target=ask, args=(letter,)) for letter in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {letter: {letter * 4} for letter in "abc"}


def test_it_works_inside_a_running_event_loop(engines):
    async def ask():
        with LLM() as llm:
            return run(llm, "ab")[0].outputs[0].text

    assert asyncio.run(ask()) == "aba"


def test_seeds_repeat_from_run_to_run_and_differ_between_requests(engines, monkeypatch):
    def seeds(seed):
        seen = []
        with LLM(seed=seed) as llm:
            submit = llm._client.submit
            monkeypatch.setattr(
                llm._client, "submit", lambda r: (seen.append(r.params.seed), submit(r))
            )
            run(llm, ["a", "b"])
        return seen

    assert seeds(0) == seeds(0)
    assert len(set(seeds(0) + seeds(1))) == 4


def test_chat_renders_the_template_and_guards_content(engines):
    with LLM() as llm:
        [output] = llm.chat([{"role": "user", "content": "a<|end|>"}], use_tqdm=False)
        several = llm.chat([[{"role": "user", "content": text}] for text in "xy"], use_tqdm=False)
    assert output.prompt == "<|user|>a<|end|><|end|>"
    assert output.prompt_token_ids == [258, *b"a<|end|>", 259]
    assert [result.prompt for result in several] == ["<|user|>x<|end|>", "<|user|>y<|end|>"]


def test_chat_takes_another_template(engines):
    with LLM() as llm:
        [output] = llm.chat(
            [{"role": "user", "content": "hi"}],
            use_tqdm=False,
            chat_template="{{ mood }}: {{ messages[0].content }}",
            chat_template_kwargs={"mood": "happy"},
        )
    assert output.prompt == "happy: hi"


def test_chat_renders_tools(engines):
    tool = {"type": "function", "function": {"name": "weather"}}
    with LLM() as llm:
        [output] = llm.chat(
            [{"role": "user", "content": "hi"}],
            use_tqdm=False,
            chat_template="{{ tools[0].function.name }}: {{ messages[0].content }}",
            tools=[tool],
        )
    assert output.prompt == "weather: hi"


def test_the_models_defaults_apply_where_no_params_are_given(engines):
    with LLM() as llm:
        assert llm.get_default_sampling_params().max_tokens == 3
        assert len(run(llm, "a")[0].outputs[0].token_ids) == 3
        assert llm.get_tokenizer().encode("a") == [97]


def test_a_misspelt_option_names_the_nearest(engines):
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(max_model_length=5)
    assert LLM(block_size=32).config.page_size == 32


def test_closing_twice_is_fine_and_a_new_one_can_follow(engines):
    llm = LLM()
    llm.close()
    llm.close()
    assert "closed" in repr(llm)
    with pytest.raises(EngineStopped):
        run(llm, "a")
    with LLM() as again:
        assert run(again, "a")[0].outputs[0].text == "aaa"


def test_a_forgotten_llm_closes_its_engine(engines):
    started, _ = engines
    llm = LLM()
    del llm
    gc.collect()
    with pytest.raises(EngineStopped):
        started[0].stats()


def test_a_dying_engine_raises_engine_stopped(engines):
    engines[1].update(dies_at=ord("!"))
    with LLM() as llm, pytest.raises(EngineStopped, match="the step failed") as caught:
        run(llm, ["a", "b!"], SamplingParams(max_tokens=50))
    assert "the device is gone" in str(caught.value.__cause__)


def test_ctrl_c_aborts_what_is_outstanding(engines):
    started, options = engines
    options.update(step_s=0.001, max_model_len=10**7)
    with LLM() as llm:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(llm, ["a"] * 20, SamplingParams(max_tokens=10**6))
        assert time.monotonic() - begin < 5
        assert started[0].stats().num_running == 0
        assert run(llm, "a")[0].outputs[0].text == "aaa"


def test_a_progress_bar_is_shown_on_request(engines, capsys):
    with LLM() as llm:
        llm.generate(["a", "b"])
    assert "2/2" in capsys.readouterr().err


def test_generate_loads_and_closes_a_model(engines):
    assert generate("ab", use_tqdm=False)[0].outputs[0].text == "aba"
    with pytest.raises(EngineStopped):
        engines[0][0].stats()


def test_outputs_are_plain_values(engines):
    with LLM() as llm:
        [output] = run(llm, "a")
    assert dataclasses.asdict(output)["outputs"][0]["text"] == "aaa"
    assert "text='aaa'" in repr(output)


def test_importing_jaxserve_imports_no_jax():
    code = (
        "import sys, jaxserve, jaxserve.llm, jaxserve.generation; jaxserve.SamplingParams();"
        "assert not {'jax', 'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
