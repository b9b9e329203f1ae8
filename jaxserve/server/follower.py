"""`jaxserve serve` in a process that follows process 0: a health port, and an end with the others.

Imports no jax.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from jaxserve.server.http import address_of, bind, http_server

logger = logging.getLogger("jaxserve")


def follow(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    place: Place,
    engine_command: Sequence[str],
) -> int:
    """Runs the engine's part of this process until the cluster ends. Returns the exit status.

    0 when process 0 ended in order, or a signal came before it; 1 when a process was lost or this
    one could not start.
    """
    sock = _health_socket(server_config, place)
    return asyncio.run(_FollowerLife(engine_config, server_config, place, engine_command).run(sock))


def _health_socket(config: ServerConfig, place: Place) -> socket.socket | None:
    """Returns what /health listens on; None where the server's own port is process 0's, or taken.

    Several processes on one host, as Slurm starts them, share their options.
    """
    if config.health_port != "auto":
        return bind(config.host, config.health_port)
    if config.port and is_here(place.host):
        logger.info("no /health in this process: port %d is that of process 0", config.port)
        return None
    try:
        return bind(config.host, config.port)
    except ConfigError as error:
        logger.info("no /health in this process: %s", error)
        return None


def is_here(host: str) -> bool:
    """Returns whether a host, by name or address, is this one."""
    with contextlib.suppress(OSError):  # a name that is not known yet
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as sock:
                sock.bind(address)  # fails for an address of another host
                return True
    return False


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
        self._is_leaving = asyncio.Event()  # before process 0 has been heard

    async def run(self, sock: socket.socket | None) -> int:
        """Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        http = http_server(self._app(), self._server_config)
        tasks = []
        if sock is not None:
            logger.info("listening on %s", address_of(sock))
            tasks.append(asyncio.create_task(http.serve(sockets=[sock])))
        engine = self._engine = await IpcClient.start(
            self._engine_config, report=logger.info, command=self._engine_command
        )
        following = asyncio.create_task(self._follow(engine))
        leaving = asyncio.create_task(self._is_leaving.wait())
        try:
            await asyncio.wait({*tasks, following, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            following.cancel()
            leaving.cancel()
            await engine.close()
            http.should_exit = True
            await asyncio.gather(*tasks)
        if self._is_leaving.is_set():
            return 0
        if engine.has_ended:
            logger.info("process 0 has ended, and this process with it")
            return 0
        logger.error("%s", engine.error)
        return 1

    async def _follow(self, engine: IpcClient) -> None:
        """Returns when the cluster has ended, or cannot start."""
        with contextlib.suppress(JaxserveError):  # the client keeps it
            await engine.wait_ready()
            logger.info("process %d follows process 0", self._place.process_id)
        await engine.stopped.wait()

    def _app(self) -> Starlette:
        async def health(_: HttpRequest) -> Response:
            if self._engine is None or self._engine.error is None:
                return Response()
            return PlainTextResponse(f"{self._engine.error}\n", status_code=503)

        return Starlette(routes=[Route("/health", health)])

    def _on_signal(self, number: int) -> None:
        """Waits for process 0 at the first signal, if it was ever there; ends at the second.

        Kubernetes tells all processes at the same time to end. Process 0 lets the running requests
        finish, for which it needs the others.
        """
        if self._is_asked_to_end:
            if self._engine is not None:
                self._engine.kill()
            os._exit(128 + number)
        self._is_asked_to_end = True
        if self._engine is None or not self._engine.has_joined:
            logger.info("%s: ends before process 0 was there", signal.Signals(number).name)
            self._is_leaving.set()
            return
        logger.info("%s: goes on until process 0 ends", signal.Signals(number).name)
