"""How model families write tool calls: one parser each, and how to tell which one a model needs.

Parsers are generators over `jaxserve.text.source`. Host only: imports no jax.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from jaxserve.text.source import Parse, Source
from jaxserve.text.tool_parsers import (
    deepseek,
    gemma,
    grammar,
    harmony,
    hermes,
    llama,
    mistral,
    pythonic,
    qwen_xml,
)
from jaxserve.text.tool_parsers.grammar import Surface
from jaxserve.text.tool_parsers.tools import Tools


def new_id() -> str:
    """Returns an id for a tool call, in vLLM's form."""
    return f"chatcmpl-tool-{secrets.token_hex(16)}"


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family writes tool calls."""

    name: str
    parse: Callable[[Source, Tools], Parse[None]]
    marks: tuple[str, ...]  # what must be visible, special tokens or not
    surfaces: tuple[Surface, ...] = ()  # what a grammar can guarantee; the first that fits
    parse_marked: Callable[[Source, Tools], Parse[None]] | None = None  # if `parse` reads more
    call_start: str | None = None  # the mark that also ends a thinking left open
    new_id: Callable[[], str] = new_id


HERMES = ToolFormat(
    name="hermes",
    parse=hermes.parse,
    marks=(hermes.START, hermes.END),
    surfaces=(grammar.HERMES,),
    parse_marked=hermes.parse_marked,
    call_start=hermes.START,
)
QWEN_XML = ToolFormat(
    name="qwen3_coder",
    parse=qwen_xml.parse,
    marks=(hermes.START, hermes.END),
    surfaces=(grammar.QWEN_XML,),
    call_start=qwen_xml.START,
)
LLAMA_3 = ToolFormat(
    name="llama3_json", parse=llama.parse, marks=(llama.TAG,), surfaces=(grammar.LLAMA_3,)
)
MISTRAL = ToolFormat(
    name="mistral",
    parse=mistral.parse,
    marks=(mistral.START, mistral.CALL_ID, mistral.ARGS),
    surfaces=(grammar.MISTRAL_NAMED, grammar.MISTRAL_ARRAY),
    new_id=mistral.new_id,
)
PYTHONIC = ToolFormat(name="pythonic", parse=pythonic.parse, marks=(pythonic.START, pythonic.END))
GEMMA_4 = ToolFormat(name="gemma4", parse=gemma.parse_gemma4, marks=gemma.GEMMA_4.all)
FUNCTION_GEMMA = ToolFormat(
    name="functiongemma", parse=gemma.parse_function_gemma, marks=gemma.FUNCTION_GEMMA.all
)
DEEPSEEK_V3 = ToolFormat(
    name="deepseek_v3",
    parse=deepseek.parse_v3,
    marks=deepseek.MARKS,
    surfaces=(grammar.DEEPSEEK_V3,),
)
DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    parse=deepseek.parse_v31,
    marks=deepseek.MARKS,
    surfaces=(grammar.DEEPSEEK_V31,),
)
HARMONY = ToolFormat(
    name="openai", parse=harmony.parse, marks=harmony.MARKS, surfaces=(grammar.HARMONY,)
)

# vLLM's names, so that its flags can be kept.
FORMATS = {
    **{
        format.name: format
        for format in (
            HERMES,
            QWEN_XML,
            LLAMA_3,
            MISTRAL,
            PYTHONIC,
            GEMMA_4,
            FUNCTION_GEMMA,
            DEEPSEEK_V3,
            DEEPSEEK_V31,
            HARMONY,
        )
    },
    "qwen3_json": HERMES,
    "qwen3_xml": QWEN_XML,
}

# What a chat template says of the calls that its model writes; the first that fits counts.
_MARKS_IN_TEMPLATES = (
    ("<|channel|>", HARMONY),
    ("<|tool_call>", GEMMA_4),
    ("<start_function_call>", FUNCTION_GEMMA),
    ("[TOOL_CALLS]", MISTRAL),
    ("<function=", QWEN_XML),
    ("[func_name1(", PYTHONIC),
    ('"parameters": dictionary of argument name', LLAMA_3),
    ("<|python_tag|>", LLAMA_3),
)


def format_of(template: str) -> ToolFormat | None:
    """Returns the format whose marks a chat template holds, if it is a known one."""
    if "tools" not in template:
        return None
    if deepseek.CALL in template:
        return DEEPSEEK_V3 if deepseek.FENCE in template else DEEPSEEK_V31
    for mark, format in _MARKS_IN_TEMPLATES:
        if mark in template:
            return format
    # GLM marks its calls alike and writes something else between the marks.
    is_hermes = hermes.START in template and "<arg_key>" not in template
    return HERMES if is_hermes else None
