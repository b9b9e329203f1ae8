"""DeepSeek's calls between marks of their own, in the form of V3 and R1 and in that of V3.1."""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.text.source import CallStart, Content, Malformed, Parse, Source
from jaxserve.text.tool_parsers.json_calls import MAX_NAME, starts_object, stream_arguments
from jaxserve.text.tool_parsers.tools import Tools

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
MARKS = (CALLS, CALLS_END, CALL, CALL_END, SEPARATOR)
FENCE = "```json"


def parse_v3(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls: `function<sep>name`, then the arguments in a JSON fence."""
    return (yield from _parse(source, _v3_name))


def parse_v31(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls: `name<sep>{...}`."""
    return (yield from _parse(source, _v31_name))


def _parse(source: Source, read_name: Callable[[Source], Parse[str]]) -> Parse[None]:
    index = 0
    while mark := (yield from source.until((CALLS, CALL, CALLS_END), Content)):
        if mark != CALL:
            continue
        source.record(CALL)
        try:
            name = (yield from read_name(source)).strip()
            yield from source.space()
            if not name or not (yield from starts_object(source)):
                raise Malformed
        except Malformed:
            yield Content(source.recorded())
            continue
        source.recorded()
        yield CallStart(index, name)
        yield from stream_arguments(source, index, ends=(CALL_END,))
        yield from source.until((CALL_END,))
        index += 1


def _v3_name(source: Source) -> Parse[str]:
    yield from source.take_until(SEPARATOR, MAX_NAME)
    name = yield from source.take_until("\n", MAX_NAME)
    yield from source.space()
    yield from source.expect(FENCE)
    return name


def _v31_name(source: Source) -> Parse[str]:
    return (yield from source.take_until(SEPARATOR, MAX_NAME))
