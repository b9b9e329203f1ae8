"""What the grammars of tool calls allow, asked of llguidance, and that the parsers read it."""

import json

import pytest

from jaxserve.engine.grammar import GrammarCompiler
from jaxserve.structured_outputs import Grammar
from jaxserve.text import reasoning, tool_parsers
from jaxserve.text.grammar import vocabulary_of
from jaxserve.text.message_format import MessageFormat
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tool_parsers import grammar
from jaxserve.text.tool_parsers.grammar import Surface, Thinking, call_grammar
from tests.fakes import byte_tokenizer
from tests.text.reading import TOOLS, calls_in, read, reader
from tests.text.small_tokenizers import byte_level

ROME = ("weather", {"city": "Rome", "days": 3})
SURFACES = {
    "HERMES": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    ),
    "QWEN_XML": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "LLAMA_3": (
        '{"name": "weather", "parameters": {"city": "Rome", "days": 3}}; '
        '{"name": "now", "parameters": {}}'
    ),
    "MISTRAL_ARRAY": (
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome", "days": 3}}, '
        '{"name": "now", "arguments": {}}]'
    ),
    "MISTRAL_NAMED": '[TOOL_CALLS]weather[ARGS]{"city": "Rome", "days": 3}[TOOL_CALLS]now[ARGS]{}',
    "DEEPSEEK_V3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Rome", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'
        "<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "DEEPSEEK_V31": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Rome", "days": 3}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>"
    ),
    "HARMONY": (
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        '{"city": "Rome", "days": 3}'
    ),
}
FREE = [name for name in SURFACES if getattr(grammar, name).trigger]


@pytest.fixture(scope="module")
def compiler():
    vocabulary = vocabulary_of(byte_tokenizer())
    compiler = GrammarCompiler(vocabulary, vocab_size=260, eos_tokens=(257,))
    yield compiler
    compiler.close()


def allows(compiler, source, text):
    """True if `text` is a whole answer, False if it cannot begin one."""
    matcher = compiler.matcher_for(Grammar(source=source)).inner
    tokens = list(text.encode())
    if matcher.validate_tokens(tokens) < len(tokens):
        return False
    matcher.consume_tokens(tokens)
    assert matcher.is_accepting()
    return True


def source_of(name, **options):
    return call_grammar(
        getattr(grammar, name), TOOLS, special_id=lambda mark: None, marks=(), **options
    )


def format_with(surface: Surface) -> str:
    return next(name for name, format in tool_parsers.FORMATS.items() if surface in format.surfaces)


def test_every_surface_has_such_a_text():
    known = {name for name, value in vars(grammar).items() if isinstance(value, Surface)}
    assert known == set(SURFACES)


@pytest.mark.parametrize("name", SURFACES)
def test_required_calls_are_all_that_is_allowed(compiler, name):
    source, text = source_of(name), SURFACES[name]
    assert allows(compiler, source, text)
    assert not allows(compiler, source, "Hello")
    assert not allows(compiler, source, text.replace("weather", "wealth"))
    assert not allows(compiler, source, text.replace("3", '"x"'))


@pytest.mark.parametrize("name", SURFACES)
def test_what_is_allowed_is_read_as_calls(name):
    said = read(reader(format_with(getattr(grammar, name))), [SURFACES[name]])
    assert said.content == ""
    calls = [(called, json.loads(arguments)) for called, arguments in calls_in(said)]
    assert calls == ([ROME] if name == "HARMONY" else [ROME, ("now", {})])


@pytest.mark.parametrize("name", FREE)
def test_free_answers_may_do_without_calls_but_not_with_wrong_ones(compiler, name):
    source, text = source_of(name, is_free=True), SURFACES[name]
    assert allows(compiler, source, "Hello")
    assert allows(compiler, source, f"Look: {text}")
    assert not allows(compiler, source, f"Look: {text.replace('weather', 'wealth')}")


def test_a_single_call_is_the_end_when_no_more_are_wanted(compiler):
    source, text = source_of("HERMES", max_calls=1), SURFACES["HERMES"]
    first, end, rest = text.partition("</tool_call>")
    assert allows(compiler, source, first + end)
    assert not allows(compiler, source, first + end + rest)


@pytest.mark.parametrize(
    ("thinking", "good", "bad"),
    [
        (Thinking(start="<think>", ends=("</think>",)), ["", "<think>Hm</think>\n\n"], ["Hm"]),
        (
            Thinking(start="", ends=("</think>",), is_certain=True),
            ["</think>", "Hm < \n</think>\n"],
            ["Hm</think>no"],
        ),
        (
            Thinking(start="<think>", ends=("</think>",), is_start_certain=False, is_certain=True),
            ["<think>Hm</think>", "Hm</think>"],
            ["Hm</think>no"],
        ),
    ],
)
def test_thinking_comes_first(compiler, thinking, good, bad):
    source = source_of("HERMES", thinking=thinking)
    assert all(allows(compiler, source, before + SURFACES["HERMES"]) for before in good)
    assert not any(allows(compiler, source, before + SURFACES["HERMES"]) for before in bad)


def test_marks_that_are_special_tokens_go_by_their_ids(compiler):
    tokenizer = byte_tokenizer()
    user, end = tokenizer.token_of("<|user|>"), tokenizer.token_of("<|end|>")
    source = call_grammar(
        Surface(before="<|user|>{name}:", after="<|end|>", trigger="<|user|>"),
        TOOLS,
        special_id=tokenizer.token_of,
        marks=("<|user|>", "<|end|>"),
        thinking=Thinking(start="<|end|>", ends=("<|user|>",)),
        is_free=True,
    )
    matcher = compiler.matcher_for(Grammar(source=source)).inner
    tokens = [end, *b"Hm", user, *b"Hi", user, *b"now:{}", end, *b"bye"]
    assert matcher.validate_tokens(tokens) == len(tokens)
    assert matcher.validate_tokens([end, user, user, *b"then"]) == 3


def test_thinking_ends_after_its_budget_although_its_mark_is_no_special_token():
    backend = byte_level()
    backend.add_tokens(["</think>"])
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": "</s>"})
    end, eos = tokenizer.token_of("</think>"), tokenizer.token_of("</s>")
    assert end is not None and end not in tokenizer.special_ids
    vocabulary = vocabulary_of(tokenizer, ["</think>"])
    compiler = GrammarCompiler(vocabulary, vocab_size=end + 1, eos_tokens=(eos,))
    a = tokenizer.token_of("a")
    format = MessageFormat(reasoning=reasoning.QWEN_3)
    source = format.budget_grammar("<think>\n", 3, tokenizer)
    for tokens, is_allowed in (
        ([a, a, a, end, a, a, a, a], True),
        ([a, end, a, a, a, a], True),
        ([a, a, a, a], False),
        ([end, end], False),
    ):
        matcher = compiler.matcher_for(Grammar(source=source)).inner
        # One by one, as the engine does: the budget counts tokens that have been consumed.
        allowed = [
            matcher.validate_tokens([token]) and matcher.consume_token(token) for token in tokens
        ]
        assert all(allowed) is is_allowed
    compiler.close()


def test_schemas_with_definitions_keep_them(compiler):
    schema = {
        "type": "object",
        "properties": {"unit": {"$ref": "#/$defs/unit"}, "note": {"enum": ["a", "b"]}},
        "required": ["unit"],
        "$defs": {"unit": {"enum": ["C", "F"]}},
    }
    for surface, good in (
        (grammar.LLAMA_3, '{"name": "t", "parameters": {"unit": "C"}}'),
        (
            grammar.QWEN_XML,
            "<tool_call>\n<function=t>\n<parameter=unit>\nC\n</parameter>\n"
            "<parameter=note>\na\n</parameter>\n</function>\n</tool_call>",
        ),
    ):
        source = call_grammar(surface, {"t": schema}, special_id=lambda mark: None, marks=())
        assert allows(compiler, source, good)
        assert not allows(compiler, source, good.replace("C", "K"))


@pytest.mark.parametrize("is_free", [True, False])
def test_the_model_chooses_the_tokens_of_text_that_can_only_be_so(compiler, is_free):
    matcher = compiler.matcher_for(Grammar(source=source_of("HERMES", is_free=is_free))).inner
    matcher.consume_tokens(list(b"<tool_call>"))
    assert matcher.compute_ff_tokens() == []
    assert matcher.validate_tokens(list(b'\n{"name": "')) == 11
