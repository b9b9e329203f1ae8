"""From a client's wish to a matcher: what compiles, what is refused, how soon."""

import json
import random
import time

import jsonschema
import numpy as np
import pytest
import tokenizers
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par

from jaxserve.engine.grammar import COMPILE_LIMIT_S, MAX_COMPILED, GrammarCompiler
from jaxserve.engine.request import SamplingParams
from jaxserve.errors import RequestError
from jaxserve.structured_outputs import Grammar, StructuredOutputsParams
from jaxserve.text.grammar import grammar_for, vocabulary_of
from jaxserve.text.tokenizer import Tokenizer
from tests.fakes import EOS, byte_tokenizer
from tests.schemas import SCHEMAS

TOKENIZER = byte_tokenizer()
VOCAB_SIZE = 260


@pytest.fixture(scope="module")
def compiler():
    compiler = GrammarCompiler(vocabulary_of(TOKENIZER), vocab_size=VOCAB_SIZE, eos_tokens=(EOS,))
    yield compiler
    compiler.close()


def matcher_for(compiler, **fields):
    return compiler.matcher_for(grammar_for(StructuredOutputsParams(**fields), TOKENIZER))


def allowed(matcher):
    """Returns the tokens that may come next."""
    mask = np.zeros((1, -(-VOCAB_SIZE // 32)), np.int32)
    fill_next_token_bitmask_par(LLExecutor(1), [(matcher.inner, 0)], mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(matcher, seed, max_tokens=2000):
    """Returns the text of a random walk through the masks, to the grammar's end."""
    chance = random.Random(seed)
    tokens = []
    while not matcher.is_complete:
        choices = allowed(matcher)
        # The likelier the longer it goes on, as lists and strings may be endless.
        closing = [one for one in choices if one == EOS or chr(one) in '"]}']
        token = chance.choice(closing if closing and len(tokens) > 40 else choices)
        matcher.advance(token)
        assert matcher.error is None
        if token == EOS:
            break
        tokens.append(token)
        assert len(tokens) < max_tokens, TOKENIZER.decode(tokens)
    return bytes(tokens).decode()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_walk_ends_in_an_instance_of_the_schema(compiler, name):
    schema = SCHEMAS[name]
    for seed in range(6):
        text = walk(matcher_for(compiler, json=schema, disable_any_whitespace=True), seed)
        instance = json.loads(text)
        checker = jsonschema.Draft202012Validator(schema, format_checker=None)
        assert checker.is_valid(instance), text


def test_whitespace_is_free_unless_it_is_disabled(compiler):
    schema = {"type": "array", "items": {"type": "integer"}}
    for disabled in (False, True):
        matcher = matcher_for(compiler, json=schema, disable_any_whitespace=disabled)
        matcher.advance(ord("["))
        assert (ord(" ") in allowed(matcher)) is not disabled


def test_choices_may_hold_any_text(compiler):
    choices = ['a"b', "line\nbreak", "back\\slash", "\u00e9\U0001f600", "/regex/", "<bos>"]
    texts = {walk(matcher_for(compiler, choice=choices), seed) for seed in range(60)}
    assert texts == set(choices)


def test_special_tokens_come_only_where_a_grammar_names_them(compiler):
    user = TOKENIZER.token_of("<|user|>")
    assert user not in allowed(matcher_for(compiler, regex=".*"))
    assert allowed(matcher_for(compiler, grammar='start: <|user|> "a"')) == [user]
    tag = {"begin": "<|user|>", "schema": {"const": 1}, "end": "."}
    matcher = matcher_for(compiler, structural_tag={"structures": [tag], "triggers": ["<|user|>"]})
    assert user in allowed(matcher)
    matcher.advance(user)
    assert allowed(matcher) == [ord("1")]


def test_tags_with_one_trigger_are_told_apart(compiler):
    tags = [
        {"begin": "<f=a>", "schema": {"const": 1}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"const": 2}, "end": "</f>"},
    ]
    for begin, value in ((b"text <f=a>", b"1"), (b"<f=b>", b"2")):
        tag = {"structures": tags, "triggers": ["<f="]}
        matcher = matcher_for(compiler, structural_tag=tag)
        for token in begin + value + b"</f>":
            assert token in allowed(matcher), chr(token)
            matcher.advance(token)
        assert EOS in allowed(matcher) and ord("x") in allowed(matcher)


def test_a_token_that_is_not_allowed_is_an_error_for_good(compiler):
    matcher = matcher_for(compiler, choice=["yes"])
    matcher.advance(ord("n"))
    assert matcher.error and not matcher.is_complete


HOSTILE = {
    "nesting": {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
    "regex groups": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "left recursion": {"grammar": 'start: start "a"'},
    "recursive ref": {"json": {"$ref": "#"}},
    "ref to a ref": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    "huge enum": {"json": {"enum": [f"v{i}" for i in range(100_000)]}},
    "megabyte": {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(40_000)}}},
    "megabyte of text": {"json": '{"description": "' + "x" * 2**20 + '"}'},
    "deep text": {"json": "[" * 100_000},
    "many patterns": {
        "json": {
            "type": "string",
            "allOf": [
                {"anyOf": [{"pattern": f"a{{{i}}}.*"}, {"pattern": f".*b{{{i}}}"}]}
                for i in range(1, 13)
            ],
        }
    },
    "surrogate": {"regex": "\ud800"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_soon(compiler, name):
    started_s = time.monotonic()
    with pytest.raises(RequestError) as refusal:
        matcher_for(compiler, **HOSTILE[name])
    assert refusal.value.param == "structured_outputs"
    assert len(str(refusal.value)) < 1000
    assert time.monotonic() - started_s < COMPILE_LIMIT_S + 3


def test_a_grammar_that_explodes_later_ends_in_an_error_within_the_limits(compiler):
    # Each "a" more can be read in more ways.
    ways = " | ".join(" ".join(["s"] * count) for count in range(2, 12))
    matcher = matcher_for(compiler, grammar=f'start: s\ns: "a" | {ways}')
    for _ in range(200):
        started_s = time.monotonic()
        assert allowed(matcher) and time.monotonic() - started_s < 2
        matcher.advance(ord("a"))
        if matcher.error:
            break
    assert "max is 2000" in (matcher.error or "")


def test_equal_grammars_are_compiled_once_and_the_oldest_are_forgotten(compiler, monkeypatch):
    compiled = []
    compile = compiler._compile
    monkeypatch.setattr(
        compiler,
        "_compile",
        lambda source, tokenizer: (compiled.append(source), compile(source, tokenizer))[1],
    )
    grammars = [Grammar(source=f'start: "{index}"') for index in range(MAX_COMPILED + 1)]
    for grammar in (grammars[0], *grammars, grammars[-1], grammars[0]):
        compiler.matcher_for(grammar)
    # The first was compiled once for two requests, forgotten, and compiled again.
    assert compiled == [grammar.source for grammar in (*grammars, grammars[0])]


def test_a_refused_grammar_is_not_kept(compiler):
    grammar = Grammar(source="start: nowhere", param="tools")
    for _ in range(2):
        with pytest.raises(RequestError, match="tools cannot be honoured.*nowhere") as refusal:
            compiler.matcher_for(grammar)
        assert refusal.value.param == "tools"
    assert grammar.source not in compiler._compiled


def test_a_compiler_that_takes_too_long_is_not_waited_for(compiler, monkeypatch):
    monkeypatch.setattr("jaxserve.engine.grammar.COMPILE_LIMIT_S", 0.01)
    monkeypatch.setattr(compiler, "_compile", lambda *_: time.sleep(0.5))
    with pytest.raises(RequestError, match="not compiled within 0.01 s"):
        compiler.matcher_for(Grammar(source="start: /slow/"))


def test_matchers_of_one_grammar_are_apart(compiler):
    first, second = (matcher_for(compiler, choice=["ab", "cd"]) for _ in range(2))
    first.advance(ord("a"))
    assert allowed(first) == [ord("b")]
    assert allowed(second) == [ord("a"), ord("c")]


def test_a_tokenizer_without_bytes_is_refused():
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a"))
    words.decoder = tokenizers.decoders.WordPiece()
    tokenizer = Tokenizer(words)
    assert vocabulary_of(tokenizer) is None
    with pytest.raises(RequestError, match="tokens have no bytes"):
        grammar_for(StructuredOutputsParams(regex="a"), tokenizer)


def test_sampling_params_take_one_description_of_the_right_type():
    outputs = StructuredOutputsParams(regex="a", param="response_format")
    with pytest.raises(RequestError, match="is a dict"):
        SamplingParams(structured_outputs={"regex": "a"})
    with pytest.raises(RequestError, match="constrained already") as refusal:
        SamplingParams(structured_outputs=outputs, grammar=Grammar(source="start: /a/"))
    assert refusal.value.param == "response_format"
