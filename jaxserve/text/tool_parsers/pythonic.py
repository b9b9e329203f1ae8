"""`[name(key="value", other=1), name()]` as the whole answer: Llama 3.2 and 4, ToolACE, OLMo 3.

A call comes in one piece once it is complete, since a variable in it makes it none at all. Only
the names of the request's tools count.
"""

from __future__ import annotations

from jaxserve.text.source import CallArguments, CallStart, Content, Malformed, Parse, Source
from jaxserve.text.tool_parsers.json_calls import MAX_NAME
from jaxserve.text.tool_parsers.literals import closes, literal, to_json
from jaxserve.text.tool_parsers.tools import Tools

START, END = "<|python_start|>", "<|python_end|>"


def parse(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls."""
    source.record()
    try:
        yield from source.space()
        yield from source.takes(START)
        yield from source.space()
        yield from source.expect("[")
        yield from _calls(source, tools)
    except Malformed:
        yield Content(source.recorded())
    source.recorded()
    yield from source.rest(Content)


def _calls(source: Source, tools: Tools) -> Parse[None]:
    index = 0
    while not (yield from closes(source, "]", index > 0)):
        name = yield from source.take_while(_is_name_char, MAX_NAME)
        if name not in tools:
            raise Malformed
        yield from source.expect("(")
        arguments = yield from _arguments(source)
        source.record()
        yield CallStart(index, name)
        yield CallArguments(index)(arguments)
        index += 1
    yield from source.space()
    yield from source.takes(END)


def _arguments(source: Source) -> Parse[str]:
    """Reads keyword arguments; returns a JSON object."""
    items: dict[str, str] = {}
    while not (yield from closes(source, ")", bool(items))):
        key = yield from source.take_while(_is_name_char, MAX_NAME)
        if not key:
            raise Malformed
        yield from source.space()
        yield from source.expect("=")
        yield from source.space()
        items[to_json(key)] = yield from literal(source)
    return f"{{{', '.join(f'{key}: {item}' for key, item in items.items())}}}"


def _is_name_char(char: str) -> bool:
    return char.isalnum() or char in "_.-"
