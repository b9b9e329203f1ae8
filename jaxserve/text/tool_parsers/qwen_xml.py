"""`<function=name><parameter=key>text</parameter></function>`: Qwen3-Coder, Qwen 3.5.

`<tool_call>` stands around each. Parameters are plain text; the tool's schema says which of them
are not strings. Strings are passed on as they come. Host only: imports no jax.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from jaxserve.text.source import (
    CallArguments,
    CallStart,
    Content,
    Malformed,
    Parse,
    Source,
    read_whole,
)
from jaxserve.text.tool_parsers.json_calls import MAX_NAME, parsed
from jaxserve.text.tool_parsers.literals import literal, to_json
from jaxserve.text.tool_parsers.tools import Tools

START, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
_MAX_REFERENCES = 8  # in a row
_KINDS = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"integer", "number"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}


def parse(source: Source, tools: Tools) -> Parse[None]:
    """Yields content and calls."""
    index = 0
    # Models forget the outer mark now and then.
    while mark := (yield from source.until((START, FUNCTION), Content)):
        source.record(mark)
        try:
            if mark == START:
                yield from source.space()
                yield from source.expect(FUNCTION)
            name = yield from _name(source)
        except Malformed:
            yield Content(source.recorded())
            continue
        source.recorded()
        yield CallStart(index, name)
        yield from _parameters(source, tools.get(name, {}), CallArguments(index))
        yield from source.space()
        yield from source.takes(END)
        index += 1


def _name(source: Source) -> Parse[str]:
    name = (yield from source.take_until(">", MAX_NAME)).strip()
    if not name or "<" in name or "\n" in name:
        raise Malformed
    return name


def _parameters(source: Source, schema: Mapping[str, Any], make: CallArguments) -> Parse[None]:
    """Yields the arguments' object up to the end of the function."""
    properties = properties_of(schema)
    lead = "{"
    while True:
        mark = yield from source.until((PARAMETER, FUNCTION_END, END))
        if mark != PARAMETER:
            break
        try:
            key = yield from _name(source)
        except Malformed:
            continue
        yield make(f"{lead}{to_json(key)}: ")
        yield from _value(source, types_of(properties.get(key)), make)
        lead = ", "
    if mark:
        yield make("{}" if lead == "{" else "}")


def properties_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of each parameter, references within the tool's schema followed."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {key: _resolved(part, schema) for key, part in properties.items()}


def _resolved(part: Any, root: Mapping[str, Any]) -> Any:
    for _ in range(_MAX_REFERENCES):
        path = part.get("$ref") if isinstance(part, dict) else None
        if not isinstance(path, str) or not path.startswith("#/"):
            break
        part = root
        for key in path[2:].split("/"):
            part = part.get(key) if isinstance(part, dict) else None
    return part


def types_of(schema: Any) -> set[str]:
    """Returns the JSON types that a parameter's schema names."""
    types: set[str] = set()
    for part in (schema, *_list_of(schema, "anyOf"), *_list_of(schema, "oneOf")):
        kind = part.get("type") if isinstance(part, dict) else None
        kinds = kind if isinstance(kind, list) else [kind]
        types.update(kind for kind in kinds if isinstance(kind, str))
    return types


def _list_of(schema: Any, key: str) -> list[Any]:
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, list) else []


def _value(source: Source, types: set[str], make: CallArguments) -> Parse[None]:
    """Yields a parameter's value as JSON; one newline at either end of it belongs to the marks."""
    yield from source.takes("\n")
    if types <= {"string"}:
        yield make('"')
        ends = ("\n" + PARAMETER_END, PARAMETER_END)
        if (yield from source.until(ends, lambda text: make(to_json(text)[1:-1]))):
            yield make('"')
        return
    with contextlib.suppress(Malformed):
        text = yield from source.take_until(PARAMETER_END)
        yield make(convert(text.removesuffix("\n"), types))


def convert(text: str, types: set[str]) -> str:
    """Returns the text of a value of one of the JSON types; of a string if it is none of them.

    Python's spellings are understood, as models mix them in.
    """
    plain = text.strip()
    if "null" in types and plain.lower() in ("null", "none"):
        return "null"
    for read in (_as_json, _as_literal):
        with contextlib.suppress(Malformed):
            found = read(plain)
            if types & _KINDS.get(type(parsed(found)), set()):
                return found
    return to_json(text)


def _as_json(text: str) -> str:
    parsed(text)
    return text


def _as_literal(text: str) -> str:
    return read_whole(literal, text)
