"""`call:name{key:<quote>text<quote>,other:1}` between marks: Gemma 4 and FunctionGemma.

Arguments become JSON as they come. Host only: imports no jax.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from jaxserve.text.source import CallArguments, CallStart, Content, Malformed, Parse, Source
from jaxserve.text.tool_parsers.json_calls import MAX_NAME
from jaxserve.text.tool_parsers.literals import number, to_json
from jaxserve.text.tool_parsers.tools import Tools

_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null", "nil": "null"}
_CLOSING = {"{": "}", "[": "]"}


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What stands around a call and around a string."""

    start: str
    end: str
    quote: str

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return (self.start, self.end, self.quote)


GEMMA_4 = Marks(start="<|tool_call>", end="<tool_call|>", quote='<|"|>')
FUNCTION_GEMMA = Marks(start="<start_function_call>", end="<end_function_call>", quote="<escape>")


def parse_gemma4(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls."""
    return (yield from _parse(source, GEMMA_4))


def parse_function_gemma(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls."""
    return (yield from _parse(source, FUNCTION_GEMMA))


def _parse(source: Source, marks: Marks) -> Parse[None]:
    index = 0
    while (yield from source.until((marks.start,), Content)):
        source.record(marks.start)
        try:
            yield from source.space()
            yield from source.expect("call:")
            name = (yield from source.take_until("{", MAX_NAME)).strip()
            if not name:
                raise Malformed
        except Malformed:
            yield Content(source.recorded())
            continue
        source.recorded()
        yield CallStart(index, name)
        yield from _arguments(source, marks.quote, CallArguments(index))
        yield from source.until((marks.end,))
        index += 1


def _arguments(source: Source, quote: str, make: CallArguments) -> Parse[None]:
    """Yields an object, whose opening brace has been consumed, as JSON."""
    yield make("{")
    open_ends = ["}"]
    is_first = True  # in the innermost list or object
    while open_ends:
        yield from source.space()
        if not (char := (yield from source.peek())):
            return
        if char in "}],":
            source.take_now(1)
            if char != ",":
                yield make(open_ends.pop())
                is_first = False
            continue
        lead = "" if is_first else ", "
        if open_ends[-1] == "}":
            key = yield from _key(source, quote)
            if not (yield from source.takes(":")):
                if (yield from source.peek()) in ("{", "["):
                    source.take_now(1)  # nonsense between items is dropped
                continue
            yield from source.space()
            lead += f"{to_json(key)}: "
        is_first = (yield from source.peek()) in _CLOSING
        if is_first:
            opening = source.take_now(1)
            open_ends.append(_CLOSING[opening])
            yield make(lead + opening)
        else:
            yield from _scalar(source, quote, lead, make)


def _key(source: Source, quote: str) -> Parse[str]:
    if (yield from source.takes(quote)):
        with contextlib.suppress(Malformed):
            return (yield from source.take_until(quote))
        return ""
    return (yield from source.take_while(lambda char: char not in ":,{}[]")).strip()


def _scalar(source: Source, quote: str, lead: str, make: CallArguments) -> Parse[None]:
    if (yield from source.takes(quote)):
        yield make(f'{lead}"')
        if (yield from source.until((quote,), lambda text: make(to_json(text)[1:-1]))):
            yield make('"')
        return
    text = (yield from source.take_while(lambda char: char not in ",{}[]")).strip()
    try:
        value = _WORDS.get(text.lower()) or number(text)
    except Malformed:
        value = to_json(text)
    if (yield from source.peek()):  # else it may have been cut short
        yield make(lead + value)
