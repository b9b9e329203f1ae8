"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, Granite 4.

Small models forget the marks: an answer that begins with such an object is a call as well, if it
names a tool of the request.
"""

from __future__ import annotations

from jaxserve.text.source import Content, Malformed, Parse, Source
from jaxserve.text.tool_parsers.json_calls import json_call, known
from jaxserve.text.tool_parsers.tools import Tools

START, END = "<tool_call>", "</tool_call>"


def parse(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls, those without marks too."""
    index = yield from _unmarked(source, tools)
    yield from parse_marked(source, tools, index)


def parse_marked(source: Source, tools: Tools, index: int = 0) -> Parse[None]:
    """Yields content and the calls between marks, numbered from `index`."""
    while (yield from source.until((START,), Content)):
        source.record(START)
        try:
            yield from source.space()
            yield from json_call(source, index, ends=(END,))
        except Malformed:
            yield Content(source.recorded())
            continue
        index += 1
        yield from source.until((END,))


def _unmarked(source: Source, tools: Tools) -> Parse[int]:
    """Reads calls without marks; returns how many there were."""
    index = 0
    while True:
        source.record()
        yield from source.space()
        try:
            yield from json_call(source, index, is_name=known(tools), needs_arguments=True)
        except Malformed:
            yield Content(source.recorded())
            return index
        index += 1
