"""Anthropic's form of an error, for the paths of its protocol."""

from __future__ import annotations

from typing import Any

from jaxserve.server.events import error_body

PATHS = frozenset({"/v1/messages", "/v1/messages/count_tokens"})

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def message_error_body(error: Exception) -> dict[str, Any]:
    """Returns Anthropic's error object, which has no place for the field but the message."""
    told = error_body(error)
    status, param, message = told["code"], told["param"], told["message"]
    if param is not None and not message.startswith(param):
        message = f"{param}: {message}"
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}
