"""The HTTP application: every route once, the door in front of them, and how errors are told."""

from __future__ import annotations

import time
from collections.abc import Iterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from jaxserve.config import ServerConfig
from jaxserve.errors import (
    AuthenticationError,
    JaxserveError,
    MethodNotAllowed,
    NotFound,
    NotReady,
    QueueFull,
    RequestError,
)
from jaxserve.server import (
    auth,
    chat,
    chat_batch,
    completions,
    health,
    invocations,
    limits,
    messages,
    models,
    openapi,
    responses,
    tokenization,
)
from jaxserve.server.events import JSON, error_body
from jaxserve.server.message_errors import PATHS, message_error_body
from jaxserve.server.request_log import RequestRecord, log_request, open_record, recording_send
from jaxserve.server.response_store import ResponseStore
from jaxserve.server.state import ServerState

RETRY_AFTER_S = 1
# Neither counted nor logged: probes and scrapers ask all the time.
QUIET_PATHS = frozenset({"/metrics", "/health", "/ready", "/load", "/ping", "/version"})
COUNTED_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
# These answer in every phase: while loading, draining, and after the engine has died.
ALWAYS_SERVED = auth.OPEN_PATHS | {"/metrics", "/version", "/load", "/docs", "/openapi.json"}


def http_app(state: ServerState, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """Returns the routes over `state`, which may still be loading."""
    app = Starlette(
        routes=[
            Route("/v1/completions", completions.create_completion, methods=["POST"]),
            Route("/v1/chat/completions", chat.create_chat_completion, methods=["POST"]),
            Route("/v1/chat/completions/batch", chat_batch.create_chat_batch, methods=["POST"]),
            Route("/v1/responses", responses.create_response, methods=["POST"]),
            Route("/v1/responses/{response_id}", responses.get_response, methods=["GET"]),
            Route("/v1/responses/{response_id}", responses.delete_response, methods=["DELETE"]),
            Route(
                "/v1/responses/{response_id}/cancel", responses.cancel_response, methods=["POST"]
            ),
            Route("/v1/messages", messages.create_message, methods=["POST"]),
            Route("/v1/messages/count_tokens", messages.count_message_tokens, methods=["POST"]),
            Route("/invocations", invocations.invoke, methods=["POST"]),
            Route("/tokenize", tokenization.tokenize, methods=["POST"]),
            Route("/detokenize", tokenization.detokenize, methods=["POST"]),
            Route("/v1/models", models.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", models.get_model, methods=["GET"]),
            Route("/health", health.health, methods=["GET"]),
            Route("/ready", health.ready, methods=["GET"]),
            Route("/ping", health.health, methods=["GET", "POST"]),
            Route("/version", health.version, methods=["GET"]),
            Route("/load", health.load, methods=["GET"]),
            Route("/metrics", health.get_metrics, methods=["GET"]),
            *_optional_routes(state.config),
        ],
        middleware=[Middleware(Door, state=state)],
        exception_handlers={
            JaxserveError: _on_error,
            HTTPException: _on_error,
            ClientDisconnect: _on_error,
            Exception: _on_error,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.server = state
    config = state.config
    app.state.responses = ResponseStore(
        config.max_stored_responses, config.max_stored_response_bytes
    )
    return app


def _optional_routes(config: ServerConfig) -> Iterator[Route]:
    if config.enable_tokenizer_info_endpoint:
        yield Route("/tokenizer_info", tokenization.tokenizer_info, methods=["GET"])
    if not config.disable_docs:
        yield Route("/openapi.json", openapi.document, methods=["GET"])
        yield Route("/docs", openapi.page, methods=["GET"])


class Door:
    """Everything a request must pass before its route: limits, key, readiness."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._digests = auth.hash_keys(state.config.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the request in, or answers with the error that keeps it out."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        config = self._state.config
        record = open_record(scope)
        send = recording_send(send, record, config)
        try:
            await self._let_in(scope, receive, send)
        finally:
            if scope["path"] not in QUIET_PATHS:
                self._count(scope, record)
                log_request(scope, record, config)

    def _count(self, scope: Scope, record: RequestRecord) -> None:
        if record.status is None:
            return
        # One series for whatever paths and methods clients make up.
        endpoint = scope.get("endpoint")
        path = next((r.path for r in scope["app"].routes if r.endpoint is endpoint), "none")
        method = scope["method"] if scope["method"] in COUNTED_METHODS else "other"
        seconds = time.monotonic() - record.start_s
        self._state.metrics.observe_http(path, method, record.status, seconds)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        config = self._state.config
        try:
            limits.check_headers(scope, config.max_body_bytes)
            auth.authenticate(scope, self._digests)
            if scope["path"] not in ALWAYS_SERVED:
                self._state.check_ready()
        except JaxserveError as error:
            await render_error(error, scope["path"])(scope, receive, send)
            return
        body = limits.LimitedBody(receive, config.max_body_bytes, config.body_timeout_s)
        with self._state.running():
            await self._app(scope, body, send)


def render_error(error: Exception, path: str) -> Response:
    """Returns the form that an error takes in HTTP: OpenAI's, but on Anthropic's paths."""
    headers: dict[str, str] = {}
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it; the status is for the log
    if isinstance(error, QueueFull | NotReady):
        headers["retry-after"] = str(RETRY_AFTER_S)
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    status = error.status if isinstance(error, JaxserveError) else 500
    body = message_error_body(error) if path in PATHS else {"error": error_body(error)}
    return JSON(body, status_code=status, headers=headers)


async def _on_error(http: HttpRequest, error: Exception) -> Response:
    if isinstance(error, QueueFull):
        http.app.state.server.metrics.num_rejected["max_num_queued_reqs"] += 1
    if not isinstance(error, HTTPException):
        return render_error(error, http.scope["path"])
    response = render_error(_http_error(http, error), http.scope["path"])
    response.headers.update(error.headers or {})
    return response


def _http_error(http: HttpRequest, error: HTTPException) -> RequestError:
    path = http.scope["path"][:200]
    if error.status_code == 405:
        return MethodNotAllowed(f"{path} does not take {http.method}")
    if error.status_code == 404:
        return NotFound(f"there is nothing at {path}")
    return RequestError(str(error.detail))
