"""GET /openapi.json and /docs: what the endpoints take and return, from the types that they use."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from jaxserve import __version__
from jaxserve.errors import (
    AuthenticationError,
    BodyTooLarge,
    EngineStopped,
    JaxserveError,
    MethodNotAllowed,
    NotFound,
    NotReady,
    QueueFull,
    RequestError,
    SlowBody,
    WrongMediaType,
)
from jaxserve.server import message_errors
from jaxserve.server.chat_batch import ChatBatchRequest
from jaxserve.server.events import JSON
from jaxserve.server.models import ModelCard, ModelList
from jaxserve.server.protocol.chat import ChatCompletion, ChatRequest
from jaxserve.server.protocol.completions import Completion, CompletionRequest
from jaxserve.server.protocol.messages import CountRequest, MessageRequest
from jaxserve.server.protocol.responses import ResponseRequest
from jaxserve.server.protocol.tokenization import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenizerInfo,
)


@dataclass(frozen=True, kw_only=True)
class ErrorObject:
    """What went wrong."""

    message: str
    type: str
    param: str | None  # the field at fault
    code: int  # the status


@dataclass(frozen=True, kw_only=True)
class ErrorReply:
    """The body of every reply whose status is not 200."""

    error: ErrorObject


@dataclass(frozen=True, kw_only=True)
class MessageErrorObject:
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


@dataclass(frozen=True, kw_only=True)
class MessageErrorReply:
    """The same on the paths of Anthropic's protocol."""

    type: str  # error
    error: MessageErrorObject


@dataclass(frozen=True, kw_only=True)
class Types:
    """What an endpoint takes and returns, any of several types; none where there is no JSON."""

    body: tuple[Any, ...] = ()
    reply: tuple[Any, ...] = ()
    streams: bool = False  # with "stream": true


# Endpoints that are not here have neither.
TYPES: dict[str, Types] = {
    "/v1/completions": Types(body=(CompletionRequest,), reply=(Completion,), streams=True),
    "/v1/chat/completions": Types(body=(ChatRequest,), reply=(ChatCompletion,), streams=True),
    "/v1/chat/completions/batch": Types(body=(ChatBatchRequest,), reply=(ChatCompletion,)),
    # Their replies hold items of several types, which msgspec cannot describe.
    "/v1/responses": Types(body=(ResponseRequest,), reply=(dict[str, Any],), streams=True),
    "/v1/messages": Types(body=(MessageRequest,), reply=(dict[str, Any],), streams=True),
    "/v1/messages/count_tokens": Types(body=(CountRequest,), reply=(dict[str, int],)),
    "/invocations": Types(
        body=(ChatRequest, CompletionRequest), reply=(ChatCompletion, Completion), streams=True
    ),
    "/tokenize": Types(body=(TokenizeRequest,), reply=(Tokenized,)),
    "/detokenize": Types(body=(DetokenizeRequest,), reply=(Detokenized,)),
    "/tokenizer_info": Types(reply=(TokenizerInfo,)),
    "/v1/models": Types(reply=(ModelList,)),
    "/v1/models/{model}": Types(reply=(ModelCard,)),
    "/version": Types(reply=(dict[str, str],)),
    "/load": Types(reply=(dict[str, int],)),
}


# One for each status; other errors of the same status read the same.
ERRORS: tuple[type[JaxserveError], ...] = (
    RequestError,
    AuthenticationError,
    NotFound,
    MethodNotAllowed,
    SlowBody,
    BodyTooLarge,
    WrongMediaType,
    QueueFull,
    EngineStopped,
    NotReady,
)


async def document(http: HttpRequest) -> Response:
    """Returns this document."""
    routes = [route for route in http.app.routes if isinstance(route, Route)]
    has_keys = bool(http.app.state.server.config.api_key)
    return JSON(describe(routes, has_keys=has_keys))


async def page(http: HttpRequest) -> Response:
    """Returns a page over /openapi.json that needs nothing from elsewhere."""
    return HTMLResponse(_page())


@functools.cache
def _page() -> str:
    return resources.files("jaxserve.server").joinpath("docs.html").read_text()


def describe(routes: list[Route], *, has_keys: bool) -> dict[str, Any]:
    """Returns the OpenAPI document of `routes`."""
    kinds: list[Any] = [ErrorReply, MessageErrorReply]
    for types in TYPES.values():
        kinds += (*types.body, *types.reply)
    schemas, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(map(str, kinds), schemas, strict=True))
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "jaxserve", "version": __version__},
        "paths": _paths(routes, schema_of),
        "components": {"schemas": components},
    }
    if has_keys:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def _paths(routes: list[Route], schema_of: dict[str, Any]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path", "")
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operations = paths.setdefault(path, {})
            operations[method.lower()] = _operation(route, path, schema_of)
    return paths


def _operation(route: Route, path: str, schema_of: dict[str, Any]) -> dict[str, Any]:
    types = TYPES.get(path, Types())
    summary = (inspect.getdoc(route.endpoint) or "").partition("\n")[0]
    content: dict[str, Any] = {}
    if types.reply:
        content["application/json"] = {"schema": _any_of(types.reply, schema_of)}
    if types.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": summary, **({"content": content} if content else {})}},
    }
    if types.body:
        schema = _any_of(types.body, schema_of)
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    if "{" in path:
        name = path.partition("{")[2].partition("}")[0]
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    reply = MessageErrorReply if path in message_errors.PATHS else ErrorReply
    failed = {"application/json": {"schema": schema_of[str(reply)]}}
    for error in ERRORS:
        description = (inspect.getdoc(error) or "").partition("\n")[0]
        operation["responses"][str(error.status)] = {"description": description, "content": failed}
    return operation


def _any_of(kinds: Sequence[Any], schema_of: Mapping[str, Any]) -> dict[str, Any]:
    schemas = [schema_of[str(kind)] for kind in kinds]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
