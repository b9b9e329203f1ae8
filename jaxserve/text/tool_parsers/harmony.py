"""gpt-oss's messages: `<|channel|>analysis<|message|>...<|end|><|start|>assistant...`.

The channel says what a message is: `analysis` is reasoning, a recipient `functions.name` makes it
a call, everything else is content. https://github.com/openai/harmony
"""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.text.source import (
    CallArguments,
    CallStart,
    Content,
    Malformed,
    Parse,
    Piece,
    Reasoning,
    Source,
)
from jaxserve.text.tool_parsers.tools import Tools

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
CONSTRAIN, END, CALL, RETURN = "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)
RECIPIENT = "to=functions."
MAX_HEAD = 512


def parse(source: Source, tools: Tools | None) -> Parse[None]:
    """Yields reasoning, content and calls; None for tools makes calls content."""
    num_calls = 0
    mark = yield from _first_mark(source)
    while True:
        if mark not in (START, CHANNEL, RECIPIENT):
            mark = yield from source.until((START, CHANNEL), Content)
            if not mark:
                return
        source.record(mark)
        try:
            head = mark + (yield from source.take_until(MESSAGE, MAX_HEAD))
        except Malformed:
            mark = ""
            yield Content(source.recorded())
            continue
        source.recorded()
        name = _recipient_of(head)
        if name and tools is not None:
            mark = yield from _call(source, num_calls, name)
            num_calls += 1
        else:
            is_reasoning = _channel_of(head) == "analysis"
            mark = yield from _body(source, Reasoning if is_reasoning else Content)


def _first_mark(source: Source) -> Parse[str]:
    """Consumes what the answer begins with, if it is part of a head: its start is the prompt's."""
    source.record()
    yield from source.space()
    for mark in (RECIPIENT, CHANNEL, START):
        if (yield from source.takes(mark)):
            source.recorded()
            return mark
    yield Content(source.recorded())
    return ""


def _call(source: Source, index: int, name: str) -> Parse[str]:
    yield CallStart(index, name)
    start = source.num_read
    mark = yield from _body(source, CallArguments(index))
    if source.num_read - len(mark) == start:
        yield CallArguments(index)("{}")
    return mark


def _body(source: Source, make: Callable[[str], Piece]) -> Parse[str]:
    """Yields a message's text; returns the mark that ended it."""
    return (yield from source.until((END, CALL, RETURN, START, CHANNEL), make))


def _recipient_of(head: str) -> str:
    """Returns the name of the function that a message is for; "" if it is for none."""
    return _word_after(RECIPIENT, head)


def _channel_of(head: str) -> str:
    return _word_after(CHANNEL, head)


def _word_after(mark: str, head: str) -> str:
    words = head.partition(mark)[2].partition("<")[0].split(maxsplit=1)
    return words[0] if words else ""
