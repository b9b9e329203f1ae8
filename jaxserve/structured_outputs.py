"""What an answer must look like: as a client says it, and as the engine holds it.

The text side turns one into the other (`text/grammar.py`). Host only: imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxserve.errors import RequestError

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_TYPES: dict[str, tuple[type, ...]] = {
    "json": (str, dict, bool),
    "regex": (str,),
    "choice": (list, tuple),
    "grammar": (str,),
    "json_object": (bool,),
    "structural_tag": (str, dict),
    "whitespace_pattern": (str,),
    "disable_any_whitespace": (bool,),
    "disable_additional_properties": (bool,),
}


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an answer must look like: exactly one of the first six. Names are vLLM's.

    Raises `RequestError` for none, for several, and for an option that would have no effect.
    """

    json: str | dict[str, Any] | bool | None = None  # a JSON schema
    regex: str | None = None  # of the whole answer, in the syntax of Rust's regex crate
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None  # Lark as llguidance reads it, or GBNF
    json_object: bool | None = None  # any JSON object
    structural_tag: str | dict[str, Any] | None = None  # text with tags that hold JSON
    disable_any_whitespace: bool = False  # in JSON
    disable_additional_properties: bool = False  # in objects whose schema names properties
    whitespace_pattern: str | None = None  # a regex of what may stand between JSON's parts
    param: str = "structured_outputs"  # the request's field that errors name

    def __post_init__(self) -> None:
        for name, types in _TYPES.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, types):
                wanted = " or ".join(kind.__name__ for kind in types)
                raise self.error(f"{name} is a {type(value).__name__}; it takes {wanted}")
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise self.error(f"exactly one of {', '.join(KINDS)} must be given, not {said}")
        if self.json_object is False:
            raise self.error("json_object is false; leave it out, or set it to true")
        self._check_options()

    @property
    def kind(self) -> str:
        """The name of the one field of `KINDS` that is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def error(self, message: str) -> RequestError:
        """Returns an error that names the request's field."""
        return RequestError(f"{self.param}: {message}", param=self.param)

    def _check_options(self) -> None:
        has_whitespace = self.disable_any_whitespace or self.whitespace_pattern is not None
        if has_whitespace and self.kind not in ("json", "json_object", "structural_tag"):
            raise self.error(f"whitespace options apply to JSON, not to {self.kind}")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise self.error("disable_any_whitespace leaves nothing to whitespace_pattern")
        if self.disable_additional_properties and self.kind not in ("json", "structural_tag"):
            raise self.error(f"disable_additional_properties applies to a schema, not {self.kind}")


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What the engine compiles: a text in llguidance's syntax. Travels between processes."""

    source: str  # Lark, or llguidance's JSON
    param: str = "structured_outputs"  # the request's field that errors name
    # Output tokens after which it begins, the end of a thinking block; empty: at once. Until then
    # every token may come but those that end an answer.
    start_after_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The exact bytes of each token, by id; all that the engine knows of text, for grammars."""

    tokens: tuple[bytes, ...]  # b"" where there is no such token
    special_tokens: tuple[int, ...]  # no grammar allows them, unless it names them
