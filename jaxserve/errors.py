"""Every error jaxserve raises on purpose.

JaxserveError
├── ConfigError            an engine or server option that cannot be used
├── WeightError            a checkpoint that cannot be read: names the file and the tensor
├── RequestError           a request that cannot be served; `param` names the field at fault (400)
│   ├── PromptTooLong      the prompt does not fit the context (400)
│   ├── AuthenticationError  missing or wrong API key (401)
│   ├── NotFound           unknown model or path (404)
│   ├── MethodNotAllowed   a known path, a wrong method (405)
│   ├── SlowBody           the body did not arrive in time (408)
│   ├── BodyTooLarge       the body exceeds the limit (413)
│   ├── WrongMediaType     the body is not JSON (415)
│   └── QueueFull          too many waiting requests (429, Retry-After)
├── EngineStopped          the engine died or was closed; the cause is chained (500)
└── NotReady               loading or draining (503, Retry-After)
"""

from __future__ import annotations


class JaxserveError(Exception):
    """The root. `status` and `code` say how the server reports it."""

    status = 500
    code = "server_error"


class ConfigError(JaxserveError, ValueError):
    """An option of the engine or the server that cannot be used."""


class WeightError(JaxserveError):
    """A checkpoint that cannot be read; the message names the file and the tensor."""


class RequestError(JaxserveError, ValueError):
    """A request that cannot be served as asked; `param` names the field at fault."""

    status = 400
    code = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """The prompt leaves no room in the context."""

    def __init__(
        self, num_tokens: int, limit: int, *, param: str = "prompt", at_least: bool = False
    ) -> None:
        count = f"at least {num_tokens}" if at_least else f"{num_tokens}"
        super().__init__(
            f"the prompt has {count} tokens; the model's context holds {limit}, "
            "of which at least 1 must be left for the answer",
            param=param,
        )


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""

    status = 401
    code = "authentication_error"


class NotFound(RequestError):
    """The model or path does not exist."""

    status = 404
    code = "not_found_error"


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method."""

    status = 405


class SlowBody(RequestError):
    """The body did not arrive within the time limit."""

    status = 408


class BodyTooLarge(RequestError):
    """The body exceeds the server's limit."""

    status = 413


class WrongMediaType(RequestError):
    """The body's content type is not application/json."""

    status = 415


class QueueFull(RequestError):
    """Too many requests wait already; try again later."""

    status = 429
    code = "rate_limit_error"


class EngineStopped(JaxserveError):
    """The engine died or was closed; no request can finish any more."""


class NotReady(JaxserveError):
    """The server is loading or draining; try again later."""

    status = 503
    code = "overloaded_error"
