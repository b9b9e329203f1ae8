"""Tool calls out of text, whole and in pieces, for each format."""

import json
import time

import pytest
from hypothesis import given, settings, strategies as st

from jaxserve.text import tool_parsers
from tests.text.reading import calls_in, pieces_of, read, reader
from tests.text.templates import CHATML, QWEN_2_5

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
        '```json\n{"city": "Rome", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>'
        "function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
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


@settings(max_examples=20, deadline=None)
@given(text=st.one_of(texts, damaged), cuts=st.lists(st.integers(0, 1000), max_size=12))
@pytest.mark.parametrize("thinks", [None, "qwen3"])
@pytest.mark.parametrize("name", [*SPOKEN, "pythonic"])
def test_the_result_does_not_depend_on_how_the_text_is_cut(name, thinks, text, cuts):
    whole = read(reader(name, thinks), [text])
    assert read(reader(name, thinks), pieces_of(text, cuts)) == whole
    assert read(reader(name, thinks), list(text)) == whole


def hermes_call(arguments):
    return f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    "arguments",
    [
        '{"city": "Zürich \\"</tool_call>\\" {["}',
        '{ "city" : [ {"a": [1e5, null]}, "\\\\" ] }',
        "{}",
        '{"city": "😀\\ud83d\\ude00"}',
    ],
)
def test_arguments_are_the_models_own_text(arguments):
    json.loads(arguments)
    said = read(reader("hermes"), list(hermes_call(arguments)))
    assert calls_in(said) == [("weather", arguments)]


def test_arguments_come_while_they_are_written():
    made = reader("hermes")
    text = hermes_call('{"city": "Rome"}')
    said = [made.push(text[start : start + 4]) for start in range(0, len(text), 4)]
    with_arguments = [part for part in said if any(call.arguments for call in part.calls)]
    assert len(with_arguments) > 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>\nnot JSON\n</tool_call>"),
        ("hermes", "<tool_call>{'name': 'weather', 'arguments': {}}</tool_call>"),
        ("hermes", '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "weather", "argu'),
        ("hermes", "a < b <tool"),
        ("hermes", '{"name": "Ann", "arguments": {"age": 3}}'),  # an answer in JSON
        ("qwen3_coder", "<tool_call>\n<fun=weather>\n</tool_call>"),
        ("qwen3_coder", "<function=weather"),
        ("llama3_json", '{"name": "Ann", "parameters": {"age": 3}}'),
        ("llama3_json", '{"answer": 3}'),
        ("llama3_json", "<|python_tag|>print(1)"),
        ("mistral", "[TOOL_CALLS] nothing"),
        ("mistral", '[TOOL_CALLS]weather[ARGS]"Rome"'),
        ("pythonic", "[1] says so"),
        ("pythonic", "[weather(city=rome)]"),  # a variable
        ("pythonic", '[weather("Rome")]'),
        ("pythonic", '[os.system(command="ls")]'),  # not a tool of the request
        ("pythonic", '[weather(city=f"{1}")]'),
        ("pythonic", "[weather(city=" + "[" * 5000),
        ("gemma4", "<|tool_call>weather{}<tool_call|>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>weather{}<｜tool▁call▁end｜>"),
        ("openai", "plain text"),
    ],
)
def test_what_is_no_call_comes_back_as_content(name, text):
    assert read(reader(name), list(text)) == (text, "", ())


def test_a_call_cut_short_keeps_what_was_written():
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Ro'
    assert calls_in(read(reader("hermes"), [text])) == [("weather", '{"city": "Ro')]


def test_keys_may_come_in_any_order_and_arguments_as_text():
    for body in (
        '{"arguments": {"days": 1}, "name": "weather"}',
        '{"id": 7, "name": "weather", "arguments": "{\\"days\\": 1}"}',
        '{"name": "weather", "arguments": {"days": 1}',  # a brace is missing
    ):
        said = read(reader("hermes"), list(f"<tool_call>{body}</tool_call>"))
        assert [(name, json.loads(text)) for name, text in calls_in(said)] == [
            ("weather", {"days": 1})
        ]
        assert said.content == ""
    assert calls_in(read(reader("hermes"), ['<tool_call>{"name": "now"}'])) == [("now", "{}")]


def test_marks_may_be_forgotten_where_the_answer_is_a_call_to_a_known_tool():
    text = '{"name": "weather", "arguments": {"days": 1}}\n{"name": "now", "arguments": {}}'
    assert calls_in(read(reader("hermes"), list(text))) == [
        ("weather", '{"days": 1}'),
        TWO_CALLS[1],
    ]
    assert read(reader("hermes", only_marked=True), list(text)) == (text, "", ())


def test_mistral_writes_names_before_arguments_too():
    text = '[TOOL_CALLS]weather[CALL_ID]abc[ARGS]{"days": 1}[TOOL_CALLS]now{"a": 2}'
    assert calls_in(read(reader("mistral"), list(text))) == [
        ("weather", '{"days": 1}'),
        ("now", '{"a": 2}'),
    ]
    said = reader("mistral").push(text, final=True)
    assert all(call.id is not None and len(call.id) == 9 for call in said.calls)


def test_python_literals_become_json():
    text = (
        r"[weather(city='it\'s\n\u00e9', days=+1_000, wind=None, "
        """at={"a": (True, .5, '''x'y''',)})]"""
    )
    ((_, arguments),) = calls_in(read(reader("pythonic"), list(text)))
    assert json.loads(arguments) == {
        "city": "it's\né",
        "days": 1000,
        "wind": None,
        "at": {"a": [True, 0.5, "x'y"]},
    }


def xml_call(parameters):
    body = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in parameters.items())
    return f"<tool_call>\n<function=weather>\n{body}</function>\n</tool_call>"


def test_xml_parameters_take_the_types_of_the_schema():
    text = xml_call(
        {"city": "12", "days": "12", "wind": "None", "at": "{'a': [1, True]}", "unknown": "12"}
    )
    ((_, arguments),) = calls_in(read(reader("qwen3_coder"), list(text)))
    assert json.loads(arguments) == {
        "city": "12",
        "days": 12,
        "wind": None,
        "at": {"a": [1, True]},
        "unknown": "12",
    }


def test_an_xml_value_that_does_not_fit_its_type_stays_text():
    said = read(reader("qwen3_coder"), [xml_call({"days": "soon"})])
    assert calls_in(said) == [("weather", '{"days": "soon"}')]


def test_gemma_values_become_json():
    text = (
        '<|tool_call>call:weather{city:<|"|>a "b", {c}<|"|>,wind:true,days:-2,'
        'at:{x:[1.5,<|"|>y<|"|>,nil],z:bare word}}<tool_call|>'
    )
    ((_, arguments),) = calls_in(read(reader("gemma4"), list(text)))
    assert json.loads(arguments) == {
        "city": 'a "b", {c}',
        "wind": True,
        "days": -2,
        "at": {"x": [1.5, "y", None], "z": "bare word"},
    }


def test_only_the_first_call_is_kept_when_no_more_are_wanted():
    made = reader("hermes", max_calls=1)
    assert calls_in(read(made, list(SPOKEN["hermes"]))) == TWO_CALLS[:1]
    assert made.num_calls == 1


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("hermes", "<tool_call>{"),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": ['),
        ("hermes", "<tool_call>" + " " * 50),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": \''),
        ("qwen3_coder", "<function=now><parameter=days>["),
        ("llama3_json", '<|python_tag|>{"a": [[{'),
        ("pythonic", "[weather(city=[["),
        ("gemma4", "<|tool_call>call:now{a:[{"),
        ("openai", "<|channel|>to=functions.now<|message|>"),
        ("mistral", "[TOOL_CALLS][["),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{"),
    ],
)
@pytest.mark.parametrize("step", [4, 10**6])
def test_hostile_text_takes_time_in_proportion_to_its_length(name, unit, step):
    def seconds(num_chars):
        text = unit * (num_chars // len(unit))
        start = time.process_time()
        read(reader(name), [text[i : i + step] for i in range(0, len(text), step)])
        return time.process_time() - start

    seconds(1000)
    assert seconds(16_000) < 12 * max(seconds(4_000), 0.01)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (QWEN_2_5, "hermes"),
        ("{{ tools }}<tool_call><arg_key>", None),
        ("{{ tools }}<tool_call>\n<function=", "qwen3_coder"),
        (
            '{{ tools }}{"name": function name, "parameters": dictionary of argument name',
            "llama3_json",
        ),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools }}[func_name1(params_name1=", "pythonic"),
        ("{{ tools }}<|tool_call>call:", "gemma4"),
        ("{{ tools }}<start_function_call>", "functiongemma"),
        ("{{ tools }}<｜tool▁call▁begin｜>function<｜tool▁sep｜>```json", "deepseek_v3"),
        ("{{ tools }}<｜tool▁call▁begin｜>", "deepseek_v31"),
        ("{{ tools }}<|channel|>", "openai"),
        (CHATML, None),
    ],
)
def test_the_template_tells_the_format(template, name):
    found = tool_parsers.format_of(template)
    assert (found.name if found else None) == name
