"""Probes and facts: /health, /ready, /ping, /version, /load, /metrics."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.errors import EngineStopped
from jaxserve.server import exposition
from jaxserve.server.events import JSON
from jaxserve.server.state import ServerState

STATS_TIMEOUT_S = 5.0


async def health(http: HttpRequest) -> Response:
    """Returns 200 while the front and the engine live, loading and draining included."""
    state: ServerState = http.app.state.server
    state.check_alive()
    return Response()


async def ready(http: HttpRequest) -> Response:
    """Returns 200 while requests are taken, else 503 with the reason."""
    state: ServerState = http.app.state.server
    state.check_ready()
    return Response()


async def version(http: HttpRequest) -> Response:
    """Returns the package's version."""
    return JSON({"version": __version__})


async def load(http: HttpRequest) -> Response:
    """Returns how many requests are being served, this one left out."""
    state: ServerState = http.app.state.server
    return JSON({"server_load": state.num_running - 1})


async def get_metrics(http: HttpRequest) -> Response:
    """Returns what Prometheus scrapes; without the engine's part when it does not answer."""
    state: ServerState = http.app.state.server
    info = stats = None
    if state.engine is not None and state.engine.info is not None:
        with contextlib.suppress(EngineStopped, TimeoutError):
            stats = await asyncio.wait_for(state.engine.stats(), STATS_TIMEOUT_S)
            info = state.engine.info
    num_abandoned = 0 if state.engine is None else state.engine.num_abandoned
    snapshot = exposition.Snapshot(state.model_names[0], state.metrics, info, stats, num_abandoned)
    return Response(exposition.render(snapshot), media_type=exposition.CONTENT_TYPE)
