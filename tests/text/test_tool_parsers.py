"""Tool calls out of text, whole and in pieces, for each format."""


import pytest
from hypothesis import given, settings, strategies as st

from jaxserve.text import tool_parsers
from tests.text.reading import calls_in, pieces_of, read, reader

CITY = '{"city": "Zürich \\"</tool_call>\\" {[", "days": 3}'
TWO_CALLS = [("weather", '{"city": "Rome", "days": 3}'), ("now", "{}")]

# Each format's own way of saying "I look." and then TWO_CALLS.
SPOKEN = {
    "hermes": (
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    ),
    "qwen3_coder": (
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "llama3_json": (
        'I look.\n<|python_tag|>{"name": "weather", "parameters": {"city": "Rome", "days": 3}}; '
        '{"name": "now", "parameters": {}}'
    ),
    "mistral": (
        'I look.\n[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome", "days": 3}}, '
        '{"name": "now", "arguments": {}}]'
    ),
    "gemma4": (
        'I look.\n<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>"
    ),
    "functiongemma": (
        "I look.\n<start_function_call>call:weather{city:<escape>Rome<escape>,days:3}"
        "<end_function_call><start_function_call>call:now{}<end_function_call>"
    ),
    "deepseek_v3": (
        "I look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '```json\n{"city": "Rome", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'
        "<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek_v31": (
        "I look.\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        '{"city": "Rome", "days": 3}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "openai": (
        "<|channel|>commentary<|message|>I look.\n<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.weather <|constrain|>json<|message|>{"city": "Rome", "days": 3}<|call|>'
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
    ),
}
PYTHONIC = '[weather(city="Rome", days=3), now()]'


@pytest.mark.parametrize("name", SPOKEN)
def test_each_format_is_read(name):
    said = read(reader(name), [SPOKEN[name]])
    assert (said.content, calls_in(said)) == ("I look.\n", TWO_CALLS)


def test_every_format_has_such_a_text():
    names = {format.name for format in tool_parsers.FORMATS.values()}
    assert names == {*SPOKEN, "pythonic"}


@pytest.mark.parametrize("name", [*SPOKEN, "pythonic"])
def test_a_text_in_single_characters_is_read_alike(name):
    text = SPOKEN.get(name, PYTHONIC)
    said = read(reader(name), list(text))
    assert calls_in(said) == TWO_CALLS
    assert said == read(reader(name), [text])


MARKS = sorted({mark for format in tool_parsers.FORMATS.values() for mark in format.marks})
FRAGMENTS = [
    *MARKS,
    *SPOKEN.values(),
    PYTHONIC,
    *"{}[]():;,=\"\\'\n <>é0-",
    *("weather", "now", '"name": ', '"arguments": ', '{"name": "now", "arguments": {', "call:now{"),
    *("<function=now>", "<parameter=days>", "</parameter>", "</function>", "city=", "```json\n"),
    *("to=functions.now", "True", "1.5", "\\u00e9", "[TOOL_CALLS]now{", "<think>", "</think>"),
]
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=8).map(
    "".join
)
damaged = st.builds(
    lambda text, start, size: text[: start % len(text)] + text[start % len(text) + size :],
    st.sampled_from([*SPOKEN.values(), PYTHONIC]),
    st.integers(0, 500),
    st.integers(0, 12),
)


@settings(max_examples=1500, deadline=None)
@given(text=st.one_of(texts, damaged), cuts=st.lists(st.integers(0, 1000), max_size=12))
@pytest.mark.parametrize("thinks", [None, "qwen3"])
@pytest.mark.parametrize("name", [*SPOKEN, "pythonic"])
def test_the_result_does_not_depend_on_how_the_text_is_cut(name, thinks, text, cuts):
    whole = read(reader(name, thinks), [text])
    assert read(reader(name, thinks), pieces_of(text, cuts)) == whole
    assert read(reader(name, thinks), list(text)) == whole
