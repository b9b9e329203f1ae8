"""`response_format` and `structured_outputs`: what a client says of an answer's form."""

from __future__ import annotations

from typing import Any

from jaxserve.errors import RequestError
from jaxserve.structured_outputs import StructuredOutputsParams

# What vLLM took before `structured_outputs`, and what says it now.
RENAMED = {
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_json_object": "structured_outputs.json_object",
    "guided_whitespace_pattern": "structured_outputs.whitespace_pattern",
}
_OPTIONS = tuple(name for name in StructuredOutputsParams.__dataclass_fields__ if name != "param")


def structured_outputs_of(
    response_format: dict[str, Any] | None, structured_outputs: Any
) -> StructuredOutputsParams | None:
    """Returns what the answer must look like, None for anything. Raises `RequestError`."""
    given = _from_response_format(response_format)
    if structured_outputs is None:
        return given
    if given is not None:
        raise RequestError(
            "response_format and structured_outputs both say what the answer must look like",
            param="structured_outputs",
        )
    if not isinstance(structured_outputs, dict):
        raise RequestError("structured_outputs takes an object", param="structured_outputs")
    if unknown := sorted(structured_outputs.keys() - set(_OPTIONS)):
        raise RequestError(
            f"structured_outputs has no {unknown[0]!r:.80}; it takes {', '.join(_OPTIONS)}",
            param="structured_outputs",
        )
    fields = {name: value for name, value in structured_outputs.items() if value is not None}
    return StructuredOutputsParams(**fields)


def _from_response_format(body: dict[str, Any] | None) -> StructuredOutputsParams | None:
    """Returns what OpenAI's `response_format` asks for; None for {"type": "text"}."""
    if body is None:
        return None
    match body.get("type"):
        case "text":
            return None
        case "json_object":
            return _params(json_object=True)
        case "json_schema":
            return _params(json=_schema_of(body.get("json_schema")))
        case "structural_tag":
            return _params(structural_tag=_tag_of(body))
        case kind:
            raise _error(
                f"response_format.type is {kind!r:.80}; it takes text, json_object, json_schema "
                "or structural_tag"
            )


def _schema_of(json_schema: Any) -> dict[str, Any] | bool:
    """Returns the schema in {"name": ..., "strict": ..., "schema": ...}.

    `strict` need not be asked for: an answer keeps to the schema either way.
    """
    if not isinstance(json_schema, dict):
        raise _error("response_format.json_schema is missing, or no object")
    if not isinstance(json_schema.get("name", ""), str):
        raise _error("response_format.json_schema.name must be a string")
    if not isinstance(json_schema.get("strict"), bool | None):
        raise _error("response_format.json_schema.strict must be a boolean")
    schema = json_schema.get("schema")
    if not isinstance(schema, dict | bool):
        raise _error("response_format.json_schema.schema is missing, or no schema")
    return schema


def _tag_of(body: dict[str, Any]) -> dict[str, Any]:
    if "format" in body:
        raise _error(
            "response_format.format is not supported by this server; use structures and triggers"
        )
    return {name: value for name, value in body.items() if name != "type"}


def _params(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields, param="response_format")


def _error(message: str) -> RequestError:
    return RequestError(message, param="response_format")
