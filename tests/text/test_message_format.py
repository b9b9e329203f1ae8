"""Formats put together: what must be visible, where grammars begin, which surface they take."""

import pytest

from jaxserve.text import reasoning, tool_parsers
from jaxserve.text.message_format import MessageFormat
from tests.fakes import byte_tokenizer
from tests.text.reading import TOOLS, calls_in, read, reader

BYTES = byte_tokenizer()
USER, END = BYTES.token_of("<|user|>"), BYTES.token_of("<|end|>")
# Marks that the byte tokenizer has as special tokens.
THOUGHTS = reasoning.ReasoningFormat(name="test", starts=("<|user|>",), ends=("<|end|>",))


def test_marks_of_tools_are_shown_only_when_there_are_tools():
    format = MessageFormat(tools=tool_parsers.MISTRAL, reasoning=reasoning.QWEN_3)
    assert format.marks_for(has_tools=False) == ("<think>", "</think>")
    assert "[TOOL_CALLS]" in format.marks_for(has_tools=True)
    assert MessageFormat().marks_for(has_tools=True) == ()


def test_plain_models_need_no_reader():
    assert MessageFormat().reader("", TOOLS) is None
    assert MessageFormat(tools=tool_parsers.HERMES).reader("", None) is None


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("a<|user|>", (END,)), ("a<|user|>b<|end|>", ()), ("a", ())]
)
def test_an_answers_form_begins_after_a_thinking_that_is_under_way(prompt, tokens):
    format = MessageFormat(reasoning=THOUGHTS)
    assert format.tokens_before_answer(prompt, BYTES) == tokens


def test_special_marks_stand_in_grammars_by_their_ids():
    format = MessageFormat(tools=tool_parsers.HERMES, reasoning=THOUGHTS)
    free, held = (
        format.grammar("", TOOLS, BYTES, is_free=is_free, max_calls=1) for is_free in (True, False)
    )
    assert free is not None and held is not None
    assert f"<[{USER}]>" in held and f"<[{END}]>" in held
    assert format.grammar("a<|user|>b<|end|>", TOOLS, BYTES) != held


def test_a_budget_needs_an_end_that_is_one_token():
    assert MessageFormat(reasoning=THOUGHTS).budget_grammar("", 5, BYTES) is not None
    for thoughts in (reasoning.QWEN_3, reasoning.GRANITE, reasoning.HARMONY, None):
        format = MessageFormat(tools=tool_parsers.HERMES, reasoning=thoughts)
        assert format.budget_grammar("", 5, BYTES) is None
        assert format.grammar("", TOOLS, BYTES, budget=5) is None
    assert MessageFormat(reasoning=THOUGHTS).is_thinking_over("a<|user|><|end|>")
    assert not MessageFormat(reasoning=THOUGHTS).is_thinking_over("a<|user|>")


def test_forms_without_a_grammar_have_none():
    for format in (tool_parsers.PYTHONIC, tool_parsers.GEMMA_4):
        assert MessageFormat(tools=format).grammar("", TOOLS, BYTES) is None
    llama = MessageFormat(tools=tool_parsers.LLAMA_3)
    assert llama.grammar("", TOOLS, BYTES, is_free=True) is None
    assert llama.grammar("", TOOLS, BYTES) is not None


def test_mistral_takes_the_surface_that_its_tokenizer_knows():
    grammar = MessageFormat(tools=tool_parsers.MISTRAL).grammar("", TOOLS, BYTES)
    assert grammar is not None and "[ARGS]" not in grammar


def test_a_harmony_call_is_content_when_there_are_no_tools():
    text = (
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.now<|message|>{}<|call|>"
    )
    assert read(reader("openai", "openai_gptoss", tools=None), [text]) == ("{}", "Hm", ())
    said = read(reader("openai", "openai_gptoss"), list(text))
    assert (said.reasoning, said.content, calls_in(said)) == ("Hm", "", [("now", "{}")])
