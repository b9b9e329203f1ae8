"""Reads texts as messages, whole or in pieces: for tests of the tool and reasoning parsers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from jaxserve.text import reasoning, tool_parsers
from jaxserve.text.message import MessageReader, Said
from jaxserve.text.message_format import MessageFormat

TOOLS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "wind": {"type": ["boolean", "null"]},
            "at": {"anyOf": [{"type": "object"}, {"type": "array"}]},
        },
    },
    "now": {},
}


def reader(
    tool_format: str | None = None,
    reasoning_format: str | None = None,
    *,
    prompt: str = "",
    tools: dict[str, Any] | None = TOOLS,
    **options: Any,
) -> MessageReader:
    """Returns a reader of formats given by name."""
    made = MessageFormat(
        tools=tool_parsers.FORMATS[tool_format] if tool_format else None,
        reasoning=reasoning.FORMATS[reasoning_format] if reasoning_format else None,
    ).reader(prompt, tools, **options)
    assert made is not None
    return made


def pieces_of(text: str, cuts: Iterable[int]) -> list[str]:
    """Returns `text` in pieces, cut at the given places."""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


def read(made: MessageReader, pieces: Sequence[str]) -> Said:
    """Returns all that a reader makes of the pieces, joined; ids are left out."""
    said = [made.push(piece) for piece in pieces]
    said.append(made.push("", final=True))
    calls: dict[int, Any] = {}
    for delta in itertools.chain.from_iterable(part.calls for part in said):
        known = calls.get(delta.number)
        assert (delta.id is not None) == (delta.name is not None) == (known is None)
        calls[delta.number] = (
            delta._replace(id=None)
            if known is None
            else known._replace(arguments=known.arguments + delta.arguments)
        )
    return Said(
        content="".join(part.content for part in said),
        reasoning="".join(part.reasoning for part in said),
        calls=tuple(calls.values()),
    )


def calls_in(said: Said) -> list[tuple[str | None, str]]:
    """Returns name and arguments of each call."""
    return [(call.name, call.arguments) for call in said.calls]
