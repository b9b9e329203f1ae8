"""`{"name": ..., "parameters": {...}}` as the whole answer: Llama 3.1 and later.

Several calls are separated by `;`. Nothing but `<|python_tag|>`, which may be missing, tells a call
from an answer in JSON: without it only the names of the request's tools count.
"""

from __future__ import annotations

from jaxserve.text.source import Content, Malformed, Parse, Source
from jaxserve.text.tool_parsers.json_calls import json_call, known
from jaxserve.text.tool_parsers.tools import Tools

TAG = "<|python_tag|>"


def parse(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls."""
    num_calls = 0
    space = yield from source.space()
    if (yield from source.peek()) == "{":
        source.record(space)
        num_calls += yield from _calls(source, num_calls, tools, is_tagged=False)
    elif space:
        yield Content(space)
    while (yield from source.until((TAG,), Content)):
        source.record(TAG)
        num_calls += yield from _calls(source, num_calls, tools, is_tagged=True)


def _calls(source: Source, index: int, tools: Tools, *, is_tagged: bool) -> Parse[int]:
    """Reads calls up to something else; returns how many there were."""
    num_calls = 0
    is_name = bool if is_tagged else known(tools)
    try:
        while True:
            yield from source.space()
            yield from json_call(source, index + num_calls, is_name=is_name, needs_arguments=True)
            num_calls += 1
            source.record()
            yield from source.space()
            if not (yield from source.takes(";")):
                break
            yield from source.space()
            yield from source.takes(TAG)
    except Malformed:
        pass
    yield Content(source.recorded())
    return num_calls
