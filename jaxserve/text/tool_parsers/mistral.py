"""`[TOOL_CALLS]` and a JSON array of calls, or `[TOOL_CALLS]name[ARGS]{...}` for each: Mistral.

The second form is that of the tokenizers from version 11 on, where `[CALL_ID]` and an id may stand
before `[ARGS]`, and `[ARGS]` itself may be missing.
"""

from __future__ import annotations

import secrets
import string

from jaxserve.text.source import CallStart, Content, Malformed, Parse, Source
from jaxserve.text.tool_parsers.json_calls import (
    MAX_NAME,
    json_call,
    starts_object,
    stream_arguments,
)
from jaxserve.text.tool_parsers.tools import Tools

START, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ID_LETTERS = string.ascii_letters + string.digits


def new_id() -> str:
    """Returns an id as Mistral's templates demand it: nine letters and digits."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


def parse(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls."""
    num_calls = 0
    while (yield from source.until((START,), Content)):
        source.record(START)
        try:
            yield from source.space()
            if (yield from source.takes("[")):
                num_calls = yield from _array(source, num_calls)
            elif (yield from source.peek()) == "{":
                yield from json_call(source, num_calls, ends=(START,))
                num_calls += 1
            else:
                yield from _named(source, num_calls)
                num_calls += 1
        except Malformed:
            yield Content(source.recorded())


def _array(source: Source, index: int) -> Parse[int]:
    """Reads calls up to the end of the array; returns the number of the next one."""
    while True:
        yield from source.space()
        try:
            yield from json_call(source, index, ends=(START,))
        except Malformed:
            yield Content(source.recorded())
            return index
        index += 1
        source.record()
        yield from source.space()
        if not (yield from source.takes(",")):
            break
    if not (yield from source.takes("]")):
        yield Content(source.recorded())
    source.recorded()
    return index


def _named(source: Source, index: int) -> Parse[None]:
    name = yield from source.take_while(_is_name_char, MAX_NAME)
    if (yield from source.takes(CALL_ID)):
        yield from source.take_while(str.isalnum, MAX_NAME)
    yield from source.takes(ARGS)
    yield from source.space()
    if not name or not (yield from starts_object(source)):
        raise Malformed
    source.recorded()
    yield CallStart(index, name)
    yield from stream_arguments(source, index, ends=(START,))


def _is_name_char(char: str) -> bool:
    return char.isalnum() or char in "_-."
