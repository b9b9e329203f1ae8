"""Reasoning out of text, chained before tool calls."""

import pytest
from hypothesis import given, settings, strategies as st

from jaxserve.text import reasoning
from tests.text.reading import calls_in, pieces_of, read, reader

THOUGHTS = {
    "deepseek_r1": "\nI think\n</think>\n\nHi there ",
    "deepseek_v3": "<think>\nI think\n</think>\n\nHi there ",
    "qwen3": "<think>\nI think\n</think>\n\nHi there ",
    "glm45": "\n<think>I think</think>\nHi there ",
    "granite": "Here's my thought process: I think Here is my response: Hi there ",
    "gemma4": "<|channel>thought\nI think<channel|>Hi there ",
    "openai_gptoss": (
        "<|channel|>analysis<|message|>I think<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hi there "
    ),
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_reasoning_and_content_are_told_apart(name):
    text = THOUGHTS[name]
    assert read(reader(None, name), [text]) == ("Hi there ", "I think", ())
    assert read(reader(None, name), list(text)) == ("Hi there ", "I think", ())


def test_every_format_has_such_a_text():
    assert set(THOUGHTS) == set(reasoning.FORMATS)


@settings(max_examples=40, deadline=None)
@given(
    text=st.lists(
        st.one_of(
            st.sampled_from(["<think>", "</think>", "<tool_call>", "\n", " ", "Here is my", "{"]),
            st.text(max_size=4),
        ),
        max_size=8,
    ).map("".join),
    cuts=st.lists(st.integers(0, 99), max_size=8),
    prompt=st.sampled_from(["", "<think>\n", "<think>\n\n</think>\n\n"]),
)
@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3", "granite"])
def test_the_result_does_not_depend_on_how_the_text_is_cut(name, text, cuts, prompt):
    whole = read(reader("hermes", name, prompt=prompt), [text])
    assert read(reader("hermes", name, prompt=prompt), pieces_of(text, cuts)) == whole


def test_the_prompt_says_whether_thinking_is_under_way():
    asked = "user: why <think>?\nassistant: "
    assert read(reader(None, "qwen3", prompt=asked + "<think>\n"), ["Hm</think>Hi"])[:2] == (
        "Hi",
        "Hm",
    )
    closed = asked + "<think>\n\n</think>\n\n"
    assert read(reader(None, "deepseek_r1", prompt=closed), ["Hi"])[:2] == ("Hi", "")
    assert read(reader(None, "qwen3", prompt=asked), ["Hi </think>"])[:2] == ("Hi </think>", "")


def test_a_continued_message_goes_on_where_it_was():
    started = reader(None, "deepseek_r1", prompt="...", prefill="<think>\nWell")
    assert read(started, [", yes</think>Hi"])[:2] == ("Hi", ", yes")
    answered = reader(None, "deepseek_r1", prompt="...", prefill="Well")
    assert read(answered, [", yes"])[:2] == (", yes", "")


def test_thinking_without_an_end_is_all_reasoning():
    assert read(reader(None, "deepseek_r1"), ["I think </thi"])[:2] == ("", "I think </thi")


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
def test_calls_come_after_the_reasoning(name):
    text = (
        '<think>Use <tool_call>?</think>\n\n<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    )
    said = read(reader("hermes", name), list(text))
    assert (said.content, said.reasoning) == ("", "Use <tool_call>?")
    assert calls_in(said) == [("now", "{}")]


def test_a_real_call_ends_a_thinking_that_was_left_open():
    text = '<think>So: \n<tool_call>\n{"name": "now", "arguments": {}}</tool_call>'
    said = read(reader("hermes", "qwen3"), list(text))
    assert (said.reasoning, calls_in(said)) == ("So:", [("now", "{}")])


def test_reasoning_can_be_left_out():
    made = reader(None, "qwen3", has_reasoning=False)
    assert read(made, list(THOUGHTS["qwen3"])) == ("Hi there ", "", ())


def test_tokens_of_the_reasoning_are_counted():
    made = reader(None, "qwen3")
    tokens = ["<think>", "\n", "I", " think", "</think>", "\n", "Hi"]
    offset = 0
    for token in tokens:
        made.push(token, [offset])
        offset += len(token)
    made.push("", final=True)
    assert made.num_reasoning_tokens == 3


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<|channel|>analysis' }}", "openai_gptoss"),
        ("{{ '<|channel>thought' }}", "gemma4"),
        ("{{ '<｜Assistant｜><think>\n' }}", "deepseek_r1"),
        ("{% if thinking %}{{ '<｜Assistant｜><think>' }}{% endif %}", "deepseek_v3"),
        ("{% if enable_thinking is false %}{{ '<think>\n\n</think>' }}{% endif %}", "qwen3"),
        ("[gMASK]<sop>{{ '<think></think>' }}", "glm45"),
        ("Here is my thought process:", "granite"),
        ("{{ messages }}", None),
    ],
)
def test_the_template_tells_the_format(template, name):
    found = reasoning.format_of(template)
    assert (found.name if found else None) == name
