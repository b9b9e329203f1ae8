"""Answers kept to their grammars by the whole engine, on a tiny random Llama."""

import dataclasses
import json

import jax
import jsonschema
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.grammar import GrammarCompiler
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.models.checkpoint import tokenizer_files
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.text.grammar import grammar_for, vocabulary_of
from jaxserve.text.tokenizer import Tokenizer
from tests.checkpoints import write_llama_folder
from tests.driving import run, tokens_of

EOS = 2
# Prompts come in chunks, and there are pages for little more than one sequence.
CONFIG = EngineConfig(
    dtype="float32",
    max_num_seqs=4,
    max_num_batched_tokens=7,
    max_model_len=64,
    page_size=4,
    num_pages=18,
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{0,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PROMPTS = [[5, 6, 7], [9] * 19, [40, 41], [7, 8, 9, 10, 11], [200], [33] * 9]
PLAIN = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama_folder(tmp_path_factory.mktemp("llama"), seed=1)


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
def tokenizer(folder):
    return Tokenizer.from_files(tokenizer_files(folder))


@pytest.fixture(scope="module")
def compiler(core, tokenizer):
    compiler = GrammarCompiler(
        vocabulary_of(tokenizer), vocab_size=core.vocab_size, eos_tokens=core.info.eos_tokens
    )
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def constrained(tokenizer):
    def params(seed=0, *, start_after=(), max_tokens=100, **fields):
        names = StructuredOutputsParams.__dataclass_fields__
        outputs = {name: fields.pop(name) for name in list(fields) if name in names}
        grammar = grammar_for(StructuredOutputsParams(**outputs), tokenizer)
        grammar = dataclasses.replace(grammar, start_after_tokens=tuple(start_after))
        options = {"temperature": 1.0, "seed": seed, "max_tokens": max_tokens, **fields}
        return SamplingParams(grammar=grammar, **options)

    return params


@pytest.fixture(scope="module")
def json_params(constrained):
    return lambda seed=0, **fields: constrained(
        seed, json=SCHEMA, disable_any_whitespace=True, **fields
    )


def check(answer, tokenizer):
    """Asserts that a finished answer is what `SCHEMA` describes."""
    text = tokenizer.decode(answer.tokens)
    assert (answer.finish_reason, answer.is_complete) == ("stop", True), text
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("arrive_every", [0, 3])
def test_every_finished_answer_is_valid(core, compiler, json_params, tokenizer, arrive_every):
    params = [json_params(seed) for seed in range(12)]
    params[3] = dataclasses.replace(params[3], temperature=0)
    answers = run(core, PROMPTS * 2, params, arrive_every=arrive_every, compiler=compiler)
    for answer in answers:
        check(answer, tokenizer)
    assert len({tuple(answer.tokens) for answer in answers}) > 6


def test_a_neighbour_without_grammar_keeps_its_tokens(core, compiler, json_params, tokenizer):
    (alone,) = tokens_of(run(core, [PROMPTS[0]], PLAIN))
    answers = run(
        core,
        PROMPTS[:4],
        [PLAIN, *(json_params(seed) for seed in range(3))],
        arrive_every=2,
        compiler=compiler,
    )
    assert answers[0].tokens == alone
    for answer in answers[1:]:
        check(answer, tokenizer)


def test_preemption_and_neighbours_change_no_token(core, compiler, json_params):
    params = [json_params(seed) for seed in range(6)]
    params[1] = PLAIN
    alone = [
        run(core, [prompt], one, compiler=compiler)[0].tokens
        for prompt, one in zip(PROMPTS, params, strict=True)
    ]
    before = core.stats().num_preemptions
    assert tokens_of(run(core, PROMPTS, params, compiler=compiler)) == alone
    assert core.stats().num_preemptions > before


def test_a_prefix_hit_is_followed_by_a_valid_answer(core, compiler, json_params, tokenizer):
    run(core, [[77] * 20], PLAIN)
    (answer,) = run(core, [[77] * 20], json_params(), compiler=compiler)
    assert answer.num_cached_tokens > 0
    check(answer, tokenizer)


def test_only_a_grammar_waits_for_the_token_in_flight(core, compiler, json_params, monkeypatch):
    log = []
    runner = core._runner
    for name in ("pack", "dispatch", "read"):
        call = getattr(runner, name)
        monkeypatch.setattr(
            runner, name, lambda *args, name=name, call=call: (log.append(name), call(*args))[1]
        )
    run(core, [PROMPTS[0]], dataclasses.replace(PLAIN, max_tokens=3))
    plain = ["pack", "dispatch", "pack", "dispatch", "read", "pack", "dispatch", "read", "read"]
    assert log == plain
    log.clear()
    run(core, [PROMPTS[0]], json_params(max_tokens=3), compiler=compiler)
    # The next step is planned and packed while the one before it runs.
    assert log == ["pack", "dispatch", *["pack", "read", "dispatch"] * 2, "read"]


def test_nothing_compiles_and_nothing_is_moved_implicitly(core, compiler, json_params):
    with jax.transfer_guard("disallow"):
        run(core, PROMPTS, [json_params(seed) for seed in range(6)], compiler=compiler)
    assert core.stats().num_compiles_since_ready == 0


def test_logprobs_are_those_of_the_model_and_may_be_of_the_prompt(
    core, compiler, json_params, tokenizer
):
    prompt = PROMPTS[1]
    plain = dataclasses.replace(PLAIN, max_tokens=1, logprobs=5, prompt_logprobs=2)
    (free,) = run(core, [prompt], plain)
    (answer,) = run(core, [prompt], json_params(logprobs=5, prompt_logprobs=2), compiler=compiler)
    check(answer, tokenizer)
    assert answer.prompt_logprobs == free.prompt_logprobs
    assert [entry.token for entry in answer.logprobs] == answer.tokens
    assert answer.logprobs[0].top == free.logprobs[0].top


def test_the_grammar_begins_after_its_start_tokens(core, compiler, constrained, tokenizer):
    free = dataclasses.replace(PLAIN, temperature=0)
    (plain,) = tokens_of(run(core, [PROMPTS[0]], free))
    start = plain[4:6]
    first = next(i for i in range(len(plain)) if plain[i : i + 2] == start) + 2
    params = constrained(choice=["yes", "no"], start_after=start, temperature=0)
    (answer,) = run(core, [PROMPTS[0]], params, compiler=compiler)
    assert answer.tokens[:first] == plain[:first]
    assert tokenizer.decode(answer.tokens[first:]) in ("yes", "no")
    assert answer.is_complete


def test_before_its_start_an_answer_cannot_end(core, compiler, constrained):
    bias = {"logit_bias": {EOS: 100.0}}
    (free,) = run(core, [PROMPTS[0]], SamplingParams(temperature=0, max_tokens=9, **bias))
    assert free.tokens == [EOS]
    params = constrained(choice=["a"], start_after=[300, 301, 302], max_tokens=9, **bias)
    (answer,) = run(core, [PROMPTS[0]], params, compiler=compiler)
    assert EOS not in answer.tokens and answer.finish_reason == "length"


def test_min_tokens_and_ignore_eos_keep_an_open_grammar_going(core, compiler, constrained):
    bias = {"logit_bias": {EOS: 100.0}}
    digits = constrained(regex="[0-9]+", **bias)
    prompts = [PROMPTS[0]] * 3
    params = [
        digits,
        dataclasses.replace(digits, min_tokens=7),
        dataclasses.replace(digits, ignore_eos=True, max_tokens=11),
    ]
    ended, longer, endless = run(core, prompts, params, compiler=compiler)
    assert (len(ended.tokens), ended.tokens[-1], ended.finish_reason) == (2, EOS, "stop")
    assert (len(longer.tokens), longer.tokens[-1], longer.finish_reason) == (8, EOS, "stop")
    assert EOS not in endless.tokens and (len(endless.tokens), endless.finish_reason) == (
        11,
        "length",
    )


def test_a_grammar_that_allows_no_more_ends_before_min_tokens(core, compiler, constrained):
    params = constrained(regex="[0-9]", min_tokens=20, ignore_eos=True)
    (answer,) = run(core, [PROMPTS[0]], params, compiler=compiler)
    assert (len(answer.tokens), answer.is_complete) == (1, True)


def test_an_answer_that_cannot_keep_to_its_grammar_fails_alone(core, compiler, json_params):
    (alone,) = tokens_of(run(core, [PROMPTS[0]], PLAIN))
    stuck = json_params(allowed_token_ids=[300, 301])  # none of which begins an object
    answers = run(core, PROMPTS[:2], [PLAIN, stuck], compiler=compiler, may_fail=True)
    assert answers[0].tokens == alone and answers[0].error is None
    assert "could not be kept to its grammar" in answers[1].error
    assert answers[1].tokens == []


def test_an_abort_in_the_middle_leaves_the_engine_idle(core, compiler, json_params):
    params = json_params()
    request = Request(request_id="gone", prompt_tokens=(5, 6), params=params)
    core.add(request, compiler.matcher_for(params.grammar))
    for _ in range(3):
        core.step()
    core.abort(["gone"])
    while core.has_work:
        assert core.step() == []
    assert core.stats().num_pages_free == core.info.num_pages
