"""`jaxserve serve` in a process that follows process 0: a health port, and an end with the others.

Imports no jax.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.cluster import Place
from jaxserve.engine.ipc import IpcClient
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.server.http import HttpServer, address_of, bind, http_server

logger = logging.getLogger("jaxserve")


def follow(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    place: Place,
    engine_command: Sequence[str],
) -> int:
    """Runs the engine's part of this process until the cluster ends. Returns the exit status.

    0 when process 0 ended in order; 1 when a process was lost or this one could not start.
    """
    sock = _health_socket(server_config)
    return asyncio.run(_FollowerLife(engine_config, server_config, place, engine_command).run(sock))


def _health_socket(config: ServerConfig) -> socket.socket | None:
    """Returns what /health listens on; None where the server's own port is taken."""
    if config.health_port != "auto":
        return bind(config.host, config.health_port)
    try:
        return bind(config.host, config.port)
    except ConfigError as error:
        # Several processes on one host, as Slurm starts them, share their options.
        logger.info("no /health in this process: %s", error)
        return None


class _FollowerLife:
    """One following process from its first moment to its last. Belongs to the event loop."""

    def __init__(
        self,
        engine_config: EngineConfig,
        server_config: ServerConfig,
        place: Place,
        engine_command: Sequence[str],
    ) -> None:
        self._engine_config = engine_config
        self._server_config = server_config
        self._place = place
        self._engine_command = engine_command
        self._engine: IpcClient | None = None
        self._is_asked_to_end = False

    async def run(self, sock: socket.socket | None) -> int:
        """Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        http = http_server(self._app(), self._server_config)
        serving = asyncio.create_task(self._serve_health(http, sock))
        engine = self._engine = await IpcClient.start(
            self._engine_config, report=logger.info, command=self._engine_command
        )
        try:
            await engine.wait_ready()
            logger.info("process %d follows process 0", self._place.process_id)
            await engine.stopped.wait()
        except JaxserveError:
            pass  # said below
        finally:
            await engine.close()
            http.should_exit = True
            await serving
        if engine.has_ended:
            logger.info("process 0 has ended, and this process with it")
            return 0
        logger.error("%s", engine.error)
        return 1

    async def _serve_health(self, http: HttpServer, sock: socket.socket | None) -> None:
        if sock is not None:
            logger.info("listening on %s", address_of(sock))
            await http.serve(sockets=[sock])

    def _app(self) -> Starlette:
        async def health(_: HttpRequest) -> Response:
            if self._engine is None or self._engine.error is None:
                return Response()
            return PlainTextResponse(f"{self._engine.error}\n", status_code=503)

        return Starlette(routes=[Route("/health", health)])

    def _on_signal(self, number: int) -> None:
        """Waits for process 0 at the first signal; ends at once at the second.

        Kubernetes tells all processes at the same time to end. Process 0 lets the running requests
        finish, for which it needs the others.
        """
        if self._is_asked_to_end:
            if self._engine is not None:
                self._engine.kill()
            os._exit(128 + number)
        self._is_asked_to_end = True
        logger.info("%s: goes on until process 0 ends", signal.Signals(number).name)
