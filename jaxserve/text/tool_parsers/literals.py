"""Reads Python literals into JSON text, without evaluating anything.

Host only: imports no jax.
"""

from __future__ import annotations

import json
import math
import re

from jaxserve.text.source import Malformed, Parse, Source

MAX_DEPTH = 64
_MAX_NUMBER = 400  # more digits than a float has
_WORDS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ESCAPES = {
    "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0",
    "\\": "\\", "'": "'", '"': '"', "\n": "",
}  # fmt: skip
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


def literal(source: Source, depth: int = 0) -> Parse[str]:
    """Consumes a literal and returns it as JSON text; raises `Malformed` if it is none.

    Strings, numbers, True, False, None, lists, tuples and dicts with literal keys. An unknown word
    is malformed: it would be a variable.
    """
    if depth > MAX_DEPTH:
        raise Malformed
    char = yield from source.peek()
    if char and char in "'\"":
        return to_json((yield from string(source)))
    if char and char in "[(":
        return (yield from _list(source, depth))
    if char == "{":
        return (yield from _dict(source, depth))
    if char.isalpha():
        word = yield from source.take_while(str.isalpha, _MAX_NUMBER)
        if word not in _WORDS:
            raise Malformed
        return _WORDS[word]
    return number((yield from source.take_while(_is_number_char, _MAX_NUMBER)))


def to_json(text: str) -> str:
    """Returns a string as JSON."""
    return json.dumps(text, ensure_ascii=False)


def number(text: str) -> str:
    """Returns a number as JSON writes it; raises `Malformed` for anything else."""
    text = text.replace("_", "").removeprefix("+")
    if _JSON_NUMBER.fullmatch(text):
        return text
    try:
        value = float(text)
    except ValueError:
        raise Malformed from None
    if not math.isfinite(value):
        raise Malformed
    return repr(value)


def string(source: Source) -> Parse[str]:
    """Consumes a quoted string, tripled quotes included, and returns its value."""
    quote = source.take_now(1)
    if (yield from source.peek(2)) == quote * 2:
        quote += source.take_now(2)
    parts: list[str] = []
    while True:
        parts.append((yield from source.take_while(lambda char: char != "\\" and char != quote[0])))
        if (yield from source.takes(quote)):
            return "".join(parts)
        if not (char := (yield from source.peek())):
            raise Malformed
        source.take_now(1)
        parts.append((yield from _escaped(source)) if char == "\\" else char)


def _escaped(source: Source) -> Parse[str]:
    letter = yield from source.peek()
    if not letter:
        raise Malformed
    source.take_now(1)
    if (size := _HEX_ESCAPES.get(letter)) is None:
        return _ESCAPES.get(letter, "\\" + letter)
    digits = yield from source.peek(size)
    if len(digits) < size or not all(char in "0123456789abcdefABCDEF" for char in digits):
        raise Malformed
    source.take_now(size)
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise Malformed
    return chr(code)


def _list(source: Source, depth: int) -> Parse[str]:
    end = {"[": "]", "(": ")"}[source.take_now(1)]
    items: list[str] = []
    while not (yield from closes(source, end, bool(items))):
        items.append((yield from literal(source, depth + 1)))
    return f"[{', '.join(items)}]"


def _dict(source: Source, depth: int) -> Parse[str]:
    source.take_now(1)
    items: dict[str, str] = {}
    while not (yield from closes(source, "}", bool(items))):
        key = yield from literal(source, depth + 1)
        if key[0] in "[{":
            raise Malformed
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        items[key if key[0] == '"' else to_json(key)] = yield from literal(source, depth + 1)
    return f"{{{', '.join(f'{key}: {item}' for key, item in items.items())}}}"


def closes(source: Source, end: str, has_items: bool) -> Parse[bool]:
    """Consumes what stands before the next item of a list; True if its end has come instead."""
    yield from source.space()
    if (yield from source.takes(end)):
        return True
    if has_items:
        yield from source.expect(",")
        yield from source.space()
        return (yield from source.takes(end))
    return False


def _is_number_char(char: str) -> bool:
    return char in "0123456789+-.eE_"
