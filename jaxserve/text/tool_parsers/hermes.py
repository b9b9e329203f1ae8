"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3, Granite 4."""

from __future__ import annotations

from jaxserve.text.source import Content, Malformed, Parse, Source
from jaxserve.text.tool_parsers.json_calls import json_call
from jaxserve.text.tool_parsers.tools import Tools

START, END = "<tool_call>", "</tool_call>"


def parse(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls."""
    index = 0
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
