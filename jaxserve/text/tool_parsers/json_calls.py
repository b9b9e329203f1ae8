"""Calls that models write as JSON: `{"name": ..., "arguments": {...}}`.

Arguments are passed on as the model writes them, character by character. Host only: imports no jax.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from typing import Any

from jaxserve.text.source import CallArguments, CallStart, Malformed, Parse, Source

ARGUMENTS = ("arguments", "parameters")
MAX_NAME = 256
_MAX_LEAD = 64  # white space between a brace and the first key
_BARE = frozenset(" \t\r\n,:+-.0123456789abcdefghijklmnopqrstuvwxyzE")


class JsonEnd:
    """Finds the end of a JSON value. Only quotes and brackets are looked at.

    A character that can stand in no JSON outside of strings ends it as well; `is_whole` is then
    false.
    """

    def __init__(self) -> None:
        self.is_over = False
        self.is_whole = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def scan(self, text: str) -> int:
        """Returns how many characters at the start of `text` belong to the value."""
        for index, char in enumerate(text):
            if self._in_string:
                self._pass_string(char)
            elif char in "{[":
                self._depth += 1
            elif char in "}]" and self._depth > 0:
                self._depth -= 1
            elif char == '"':
                self._in_string = True
            elif char not in _BARE or self._depth == 0:
                self.is_over = True
                return index
            if self._depth == 0 and not self._in_string:
                self.is_over = self.is_whole = True
                return index + 1
        return len(text)

    def _pass_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False


def raw_value(source: Source) -> Parse[str]:
    """Consumes a JSON value and returns its text; raises `Malformed` if it is none."""
    if (yield from source.peek()) not in ("{", "[", '"'):
        return (yield from source.take_while(lambda char: char.isalnum() or char in "+-."))
    parts, end = [], JsonEnd()
    while not end.is_over and (text := (yield from source.ahead())):
        parts.append(source.take_now(end.scan(text)))
    if not end.is_whole:
        raise Malformed
    return "".join(parts)


def value(source: Source) -> Parse[Any]:
    """Consumes a JSON value and returns it; raises `Malformed` if it is none."""
    return parsed((yield from raw_value(source)))


def parsed(text: str) -> Any:
    """Returns the value of a JSON text; raises `Malformed` if it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Malformed from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def starts_object(source: Source) -> Parse[bool]:
    """Says whether a JSON object comes next, looking at its first key too; consumes nothing."""
    if (yield from source.peek()) != "{":
        return False
    for count in range(2, _MAX_LEAD):
        text = yield from source.peek(count)
        if len(text) < count or not text[-1].isspace():
            return len(text) == count and text[-1] in '"}'
    return False


def stream_arguments(
    source: Source,
    index: int,
    ends: tuple[str, ...] = (),  # what ends a call in this format; not consumed
) -> Parse[None]:
    """Yields a call's arguments as they are written: a JSON object, or all until an end mark."""
    make, end = CallArguments(index), JsonEnd()
    while not end.is_over and (text := (yield from source.ahead())):
        if size := end.scan(text):
            yield make(source.take_now(size))
    if not end.is_whole:
        # Broken JSON of a call that has been announced already: the client gets to see it.
        yield from _until_before(source, ends, make)


def _until_before(source: Source, ends: tuple[str, ...], make: CallArguments) -> Parse[None]:
    while text := (yield from source.peek(max(map(len, ends), default=1))):
        if any(text.startswith(end) for end in ends):
            return
        yield make(source.take_now(1))


def json_call(
    source: Source,
    index: int,
    *,
    is_name: Callable[[str], bool] = bool,
    needs_arguments: bool = False,
    ends: tuple[str, ...] = (),
) -> Parse[None]:
    """Reads one `{"name": ..., "arguments": {...}}`, its keys in any order.

    Raises `Malformed` for anything else, as long as no part of the call has been yielded; the
    source's record is ended only when one has.
    """
    name: str | None = None
    held: str | None = None
    yield from source.expect("{")
    while True:
        key = yield from _key(source)
        if key == "name":
            name = yield from _name(source, is_name)
        elif key in ARGUMENTS:
            if name is not None and (yield from starts_object(source)):
                yield _start(source, index, name)
                yield from stream_arguments(source, index, ends)
                yield from _skip_tail(source)
                return
            held = yield from raw_value(source)
        else:
            yield from raw_value(source)
        yield from source.space()
        if not (yield from source.takes(",")):
            break
    yield from source.expect("}")
    if name is None or (held is None and needs_arguments):
        raise Malformed
    arguments = _object_text(held)
    yield _start(source, index, name)
    yield CallArguments(index)(arguments)


def _start(source: Source, index: int, name: str) -> CallStart:
    source.recorded()
    return CallStart(index, name)


def _key(source: Source) -> Parse[str]:
    yield from source.space()
    if (yield from source.peek()) != '"':
        raise Malformed
    key = yield from value(source)
    yield from source.space()
    yield from source.expect(":")
    yield from source.space()
    return key


def _name(source: Source, is_name: Callable[[str], bool]) -> Parse[str]:
    name = yield from value(source)
    if not isinstance(name, str) or not is_name(name):
        raise Malformed
    return name


def _object_text(held: str | None) -> str:
    """Returns the text of arguments that did not come as an object after the name."""
    if held is None:
        return "{}"
    arguments = parsed(held)
    if arguments is None:
        return "{}"
    if isinstance(arguments, str):  # JSON within JSON
        held, arguments = arguments, parsed(arguments)
    if not isinstance(arguments, dict):
        raise Malformed
    return held


def _skip_tail(source: Source) -> Parse[None]:
    """Consumes what may follow the arguments in a call's object, as far as it is JSON."""
    try:
        yield from source.space()
        while (yield from source.takes(",")):
            yield from _key(source)
            yield from raw_value(source)
            yield from source.space()
        yield from source.takes("}")
    except Malformed:
        return


def known(names: Container[str]) -> Callable[[str], bool]:
    """Returns what tells the names of the request's tools from others."""
    return lambda name: name in names
