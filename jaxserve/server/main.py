"""`jaxserve serve`: the application on a socket of its own; start, signals, end.

The socket opens before the model loads, so that probes see a loading server and not a refused
connection. Only a process that may be one of several has to ask for its place first. Imports no
jax.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.cluster import place_of
from jaxserve.engine.ipc import ENGINE_COMMAND
from jaxserve.server.follower import follow
from jaxserve.server.http import HttpServer, address_of, bind, http_server
from jaxserve.server.life import DEAD_GRACE_S, POLL_S, Life, build_app
from jaxserve.server.log import configure_log

logger = logging.getLogger("jaxserve")


def run(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    environ: Mapping[str, str] = MappingProxyType({}),  # where a cluster shows itself
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """Serves until a signal or the engine's death. Returns the exit status.

    0 after a drain; 1 when the engine died or could not start. Raises `ConfigError` when the
    address is taken. A second signal ends the process at once.
    """
    configure_log(server_config)
    if (place := place_of(server_config, environ)) is not None:
        engine_command = (*engine_command, place.to_text())
        if place.process_id:
            return follow(engine_config, server_config, place, engine_command)
    sock = bind(server_config.host, server_config.port)
    app = build_app(engine_config, server_config, engine_command=engine_command)
    http = http_server(app, server_config)
    with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
        return runner.run(_Process(app.state.life, http).run(sock))


class _Process:
    """What a process of our own adds to the application. Belongs to the event loop."""

    def __init__(self, life: Life, http: HttpServer) -> None:
        self._life = life
        self._http = http
        self._asked_to_end = asyncio.Event()

    async def run(self, sock: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._http.serve(sockets=[sock]))
        while not self._http.started and not serving.done():
            await asyncio.sleep(POLL_S / 10)
        if self._http.started:
            logger.info("listening on %s", address_of(sock))
        try:
            return await self._wait_for_the_end(serving)
        finally:
            self._http.should_exit = True
            await serving

    def _on_signal(self, number: int) -> None:
        state = self._life.state
        if self._asked_to_end.is_set():
            if state.engine is not None:
                state.engine.kill()
            os._exit(128 + number)
        logger.info(
            "%s: no new requests; %d are running", signal.Signals(number).name, state.num_running
        )
        state.is_draining = True
        self._asked_to_end.set()

    async def _wait_for_the_end(self, serving: asyncio.Task[None]) -> int:
        """Returns the exit status: of a signal, of the engine's end, or of that of HTTP itself."""
        asked = asyncio.create_task(self._asked_to_end.wait())
        over = asyncio.create_task(self._life.is_over.wait())
        try:
            await asyncio.wait({asked, over, serving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            over.cancel()
        if serving.done():
            self._life.state.failure = "HTTP has ended"
            await self._life.end()  # which the lifespan does where it is left in order
            return 1
        if not self._life.is_over.is_set():
            await self._life.drain()
            return 0
        if self._life.state.text is not None:  # clients have yet to read why
            await asyncio.sleep(DEAD_GRACE_S)
        return 1
