"""Grammars of the answers that must be, or that may hold, tool calls.

They are Lark as llguidance reads it, in each format's own surface form, so that its parser reads
what they allow. Host only: imports no jax.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.text.grammar import NO_FORCING
from jaxserve.text.tool_parsers import deepseek, harmony, hermes, mistral, qwen_xml
from jaxserve.text.tool_parsers.tools import Tools

# As `json.dumps` writes and templates show it; free white space would let small models run away.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TEXT = r"TEXT: /(.|\n)*/"
_SPACE = r"SPACE: /\s{1,4}/"
_XML_TEXT = r"xml_text[lazy]: /(.|\n)*\n<\/parameter>\n/"

SpecialId = Callable[[str], int | None]  # the id of a special token; None if it is no such token


@dataclass(frozen=True, kw_only=True)
class Surface:
    """How calls are written around their arguments; `{name}` stands for the function's."""

    start: str = ""  # before the first call
    before: str
    after: str
    between: str = ""
    end: str = ""
    trigger: str = ""  # what a call begins with in free text; "" if nothing is as sure
    max_calls: int | None = None
    is_xml: bool = False  # arguments are a parameter each, not JSON
    needs: str | None = None  # a token without which the model writes another surface


HERMES = Surface(
    before=hermes.START + '\n{{"name": "{name}", "arguments": ',
    after="}}\n" + hermes.END,
    between="\n",
    trigger=hermes.START,
)
LLAMA_3 = Surface(before='{{"name": "{name}", "parameters": ', after="}}", between="; ")
MISTRAL_ARRAY = Surface(
    start=mistral.START + "[",
    before='{{"name": "{name}", "arguments": ',
    after="}}",
    between=", ",
    end="]",
    trigger=mistral.START,
)
MISTRAL_NAMED = Surface(
    before=mistral.START + "{name}" + mistral.ARGS,
    after="",
    trigger=mistral.START,
    needs=mistral.ARGS,
)
DEEPSEEK_V3 = Surface(
    start=deepseek.CALLS,
    before=f"{deepseek.CALL}function{deepseek.SEPARATOR}{{name}}\n{deepseek.FENCE}\n",
    after=f"\n```{deepseek.CALL_END}",
    between="\n",
    end=deepseek.CALLS_END,
    trigger=deepseek.CALLS,
)
DEEPSEEK_V31 = Surface(
    start=deepseek.CALLS,
    before=f"{deepseek.CALL}{{name}}{deepseek.SEPARATOR}",
    after=deepseek.CALL_END,
    end=deepseek.CALLS_END,
    trigger=deepseek.CALLS,
)
HARMONY = Surface(
    before=(
        f"{harmony.CHANNEL}commentary {harmony.RECIPIENT}{{name}} "
        f"{harmony.CONSTRAIN}json{harmony.MESSAGE}"
    ),
    after="",
    max_calls=1,  # a call ends the answer
)
QWEN_XML = Surface(
    before=f"{qwen_xml.START}\n{qwen_xml.FUNCTION}{{name}}>\n",
    after=f"{qwen_xml.FUNCTION_END}\n{qwen_xml.END}",
    between="\n",
    trigger=qwen_xml.START,
    is_xml=True,
)


def call_grammar(
    surface: Surface,
    tools: Tools,  # those that may be called
    *,
    special_id: SpecialId,
    marks: Sequence[str],  # what may be special tokens in the surface and the thinking
    thinking: Thinking | None = None,  # what may or must come first
    is_free: bool = False,  # text may stand around calls, and there may be none
    max_calls: int | None = None,
) -> str:
    """Returns the grammar of answers whose calls all fit the schemas of their tools.

    Unless it is free the answer is one or more calls, behind the thinking. Free ones need a
    surface with a trigger.
    """
    literal = _Literals(special_id, marks)
    rules = [_TEXT, _SPACE]
    begin = ""
    if thinking is not None:
        rules += thinking.rules(literal)
        begin = "thinking SPACE? " if thinking.is_certain else "(thinking SPACE?)? "
    if surface.is_xml:
        rules.append(_XML_TEXT)
    for index, (name, schema) in enumerate(tools.items()):
        before = surface.before.format(name=name)
        if is_free and not surface.start:
            before = before.removeprefix(surface.trigger)
        rules += _arguments(index, schema, literal, surface)
        rules.append(
            f"call_{index}: {literal(before)} args_{index} {literal(surface.after.format())}"
        )
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    is_one = 1 in (max_calls, surface.max_calls)
    more = "" if is_one else f"({literal(surface.between)} call)*"
    if not is_free:
        body = f"{literal(surface.start)} call {more} {literal(surface.end)}"
        return "\n".join([NO_FORCING, f"start: {begin}{body}", *rules])
    assert surface.trigger, f"{surface=} has no trigger"
    unit = "call"
    if surface.start:
        rest = literal(surface.start.removeprefix(surface.trigger))
        unit = f"{rest} call {more} {literal(surface.end)}"
    rules.append(literal.text_to("head", surface.trigger))
    return "\n".join([NO_FORCING, f"start: {begin}(head {unit})* TEXT", *rules])


def text_grammar(thinking: Thinking, *, special_id: SpecialId, marks: Sequence[str]) -> str:
    """Returns the grammar of any text behind the thinking, which its marks tell from it."""
    begin = "thinking" if thinking.is_certain else "thinking?"
    rules = thinking.rules(_Literals(special_id, marks))
    return "\n".join([NO_FORCING, f"start: {begin} TEXT", _TEXT, *rules])


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """What stands before the calls: thinking between marks."""

    start: str  # "" where the prompt has begun it
    ends: tuple[str, ...]
    is_start_certain: bool = True
    is_certain: bool = False  # it comes in any case
    budget: int | None = None  # tokens at most, which needs an end that is a special token

    def rules(self, literal: _Literals) -> list[str]:
        """Returns the rules of `thinking`."""
        start = literal(self.start)
        if start and not self.is_start_certain:
            start = f"({start})?"
        rules = [f"thinking: {start} thoughts"]
        if self.budget is None:
            return [*rules, literal.text_to("thoughts", *self.ends)]
        if self.budget == 0:
            return [*rules, f"thoughts: {literal(self.ends[0])}"]
        return [
            *rules,
            f"thoughts: limited {literal(self.ends[0])}",
            f"limited[max_tokens={self.budget}]: TEXT",
        ]


class _Literals:
    """Writes texts in Lark; marks that are special tokens go by their ids."""

    def __init__(self, special_id: SpecialId, marks: Sequence[str]) -> None:
        self._ids = {mark: token for mark in marks if (token := special_id(mark)) is not None}

    def __call__(self, text: str) -> str:
        return " ".join(self._parts(text))

    def text_to(self, rule: str, *ends: str) -> str:
        """Returns a rule for any text up to the first of `ends`, which are special or not alike."""
        if any(part.startswith("<[") for part in self._parts(ends[0])):
            return f"{rule}: TEXT ({' | '.join(map(self, ends))})"
        return f"{rule}[lazy]: TEXT ({' | '.join(map(self, ends))})"

    def _parts(self, text: str) -> list[str]:
        parts = []
        while text:
            place, mark = min(
                ((text.find(mark), mark) for mark in self._ids if mark in text),
                default=(len(text), ""),
            )
            if place:
                parts.append(json.dumps(text[:place], ensure_ascii=False))
            if mark:
                parts.append(f"<[{self._ids[mark]}]>")
            text = text[place + len(mark) :]
        return parts


def _arguments(
    index: int, schema: Mapping[str, Any], literal: _Literals, surface: Surface
) -> list[str]:
    """Returns the rules of `args_<index>`."""
    if not surface.is_xml:
        return [f"args_{index}: %json {_json(_closed(schema))}"]
    rules, parts = [], []
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    for number, (key, part) in enumerate(qwen_xml.properties_of(schema).items()):
        name = f"param_{index}_{number}"
        rules.append(f"{name}: {literal(f'{qwen_xml.PARAMETER}{key}>')} {_xml_value(part, schema)}")
        parts.append(name if key in required else f"{name}?")
    return [*rules, f"args_{index}: {' '.join(parts) or json.dumps('')}"]


def _xml_value(part: Any, root: Mapping[str, Any]) -> str:
    end = f"\n{qwen_xml.PARAMETER_END}\n"
    if isinstance(part, dict) and isinstance(choices := part.get("enum"), list):
        if all(isinstance(choice, str) for choice in choices):
            return '"\\n" (' + " | ".join(map(json.dumps, choices)) + f") {json.dumps(end)}"
    if qwen_xml.types_of(part) <= {"string"}:
        return '"\\n" xml_text'
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return f'"\\n" %json {_json({**definitions, **part})} {json.dumps(end)}'


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of the arguments: an object with the properties that it names."""
    if isinstance(schema.get("properties", {}), dict):
        return {"properties": {}, "additionalProperties": False, **schema, "type": "object"}
    return {**schema, "type": "object"}


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _JSON_OPTIONS})
