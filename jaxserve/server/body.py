"""From a body's bytes to a typed request, every fault named by its field."""

from __future__ import annotations

import logging
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from jaxserve.errors import RequestError, WrongMediaType

T = TypeVar("T", bound=msgspec.Struct)

MAX_DEPTH = 64

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")
_NOT_FINITE = re.compile(rb'"(\w{1,64})"\s*:\s*[-+]?(?:NaN|nan|Infinity|inf)')
_FIELD = re.compile(r"field `([^`]*)`")
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")

logger = logging.getLogger(__name__)


async def read_body(http: HttpRequest, decoder: msgspec.json.Decoder[T]) -> T:
    """Returns the body as the decoder's type. Raises `RequestError` naming the field at fault."""
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise WrongMediaType(f"content-type is {media_type[:100]!r}; it must be application/json")
    return decode_body(await http.body(), decoder)


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Returns the JSON text as the decoder's type. Raises `RequestError`."""
    try:
        value = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _typed_error(str(error)) from None
    except msgspec.DecodeError as error:
        if not_finite := _NOT_FINITE.search(body):
            param = not_finite.group(1).decode()
            raise RequestError(f"{param} must be a finite number", param=param) from None
        raise RequestError(f"the body is not valid JSON: {error}") from None
    except UnicodeDecodeError:
        raise RequestError("the body is not valid UTF-8") from None
    except RecursionError:
        raise RequestError(f"the body nests deeper than {MAX_DEPTH} levels") from None
    if not is_shallow(body):
        raise RequestError(f"the body nests deeper than {MAX_DEPTH} levels")
    if logger.isEnabledFor(logging.DEBUG):
        _log_unknown_fields(body, value)
    return value


def _typed_error(message: str) -> RequestError:
    """Returns msgspec's error; the path `$.messages[0].role` is the param messages.0.role."""
    path = _PATH.search(message)
    place = path.group(1) if path else ""
    if missing := _FIELD.search(message):
        place = f"{place}.{missing.group(1)}" if place else missing.group(1)
    place = re.sub(r"\[(\d+)\]", r".\1", place.replace("[...]", ""))
    text = message[: path.start()] if path else message
    return RequestError(f"{place}: {text}" if place else text, param=place or None)


def is_shallow(
    body: bytes,  # well-formed JSON
) -> bool:
    """True when nothing nests deeper than MAX_DEPTH. All work is done by passes in C."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return True
    brackets = _STRING.sub(b"", body).translate(_AS_SQUARE, _NOT_BRACKET)
    # A pass takes away the innermost pairs, so a text of depth d is empty after d passes.
    for _ in range(MAX_DEPTH):
        if not brackets:
            return True
        brackets = brackets.replace(b"[]", b"")
    return not brackets


def _log_unknown_fields(body: bytes, value: msgspec.Struct) -> None:
    given: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    if unknown := sorted(given.keys() - set(value.__struct_fields__)):
        logger.debug("fields that are not known and have no effect: %s", ", ".join(unknown)[:500])
