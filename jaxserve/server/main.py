"""`jaxserve serve`: the front in this process, the engine in a child; start, signals, end.

The socket opens at once, so that probes see a loading server and not a refused connection.
Imports no jax.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.cluster import place_of
from jaxserve.engine.ipc import ENGINE_COMMAND, IpcClient
from jaxserve.errors import JaxserveError
from jaxserve.server.app import build_app
from jaxserve.server.follower import follow
from jaxserve.server.http import HttpServer, address_of, bind, http_server
from jaxserve.server.model_text import find_model, load_text
from jaxserve.server.state import ServerState

# How long a dead server still answers its probes with 503, and its streams with the error.
DEAD_GRACE_S = 2.0
POLL_S = 0.05

logger = logging.getLogger("jaxserve")

T = TypeVar("T")


def run(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """Serves until a signal or the engine's death. Returns the exit status.

    0 after a drain; 1 when the engine died or could not start. Raises `ConfigError` when the
    address is taken. A second signal ends the process at once.
    """
    logging.basicConfig(
        level=server_config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    if (place := place_of(server_config, os.environ)) is not None:
        engine_command = (*engine_command, place.to_text())
        if place.process_id:
            return follow(engine_config, server_config, place, engine_command)
    sock = bind(server_config.host, server_config.port)
    served = server_config.served_model_name or (engine_config.model,)
    state = ServerState(config=server_config, model_names=served, root=engine_config.model)
    http = http_server(build_app(state), server_config)
    with asyncio.Runner(loop_factory=http.config.get_loop_factory()) as runner:
        return runner.run(_Life(state, http, engine_config, engine_command).run(sock))


class _Life:
    """One server from its first moment to its last. Belongs to the event loop."""

    def __init__(
        self,
        state: ServerState,
        http: HttpServer,
        engine_config: EngineConfig,
        engine_command: Sequence[str],
    ) -> None:
        self._state = state
        self._http = http
        self._engine_config = engine_config
        self._engine_command = engine_command
        self._asked_to_end = asyncio.Event()

    async def run(self, sock: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.create_task(self._http.serve(sockets=[sock]))
        while not self._http.started and not serving.done():
            await asyncio.sleep(POLL_S / 10)
        logger.info("listening on %s", address_of(sock))
        try:
            return await self._load_and_serve()
        finally:
            self._http.should_exit = True
            await serving
            if self._state.engine is not None:
                await self._state.engine.close()

    def _on_signal(self, number: int) -> None:
        if self._asked_to_end.is_set():
            if self._state.engine is not None:
                self._state.engine.kill()
            os._exit(128 + number)
        logger.info(
            "%s: no new requests; %d are running",
            signal.Signals(number).name,
            self._state.num_running,
        )
        self._state.is_draining = True
        self._asked_to_end.set()

    async def _load_and_serve(self) -> int:
        """Returns the exit status, whichever comes first: a signal, or the end of the engine."""
        ended = asyncio.create_task(self._asked_to_end.wait())
        alive = asyncio.create_task(self._live())
        try:
            await asyncio.wait({ended, alive}, return_when=asyncio.FIRST_COMPLETED)
            if not alive.done():
                await self._drain()
                return 0
            await alive
        except JaxserveError as error:
            logger.error("%s", error)
            if self._state.text is not None:  # clients have yet to read why
                await asyncio.sleep(DEAD_GRACE_S)
        except Exception:
            logger.exception("the server cannot go on")
        finally:
            ended.cancel()
            alive.cancel()
        return 1

    async def _live(self) -> None:
        """Loads the model and watches the engine. Raises when it cannot start or dies."""
        # The text side first finds the files: a download must not happen in both processes.
        state = self._state
        path = await _on_daemon(lambda: find_model(self._engine_config))
        state.engine = await IpcClient.start(
            self._engine_config, report=logger.info, command=self._engine_command
        )
        loading = _on_daemon(lambda: load_text(path, self._engine_config, state.config))
        state.text, _ = await asyncio.gather(loading, state.engine.wait_ready())
        logger.info("serving %s", ", ".join(state.model_names))
        await state.engine.stopped.wait()
        state.check_alive()

    async def _drain(self) -> None:
        """Waits for the running requests, as long as the options allow."""
        deadline_s = asyncio.get_running_loop().time() + self._state.config.shutdown_timeout
        while self._state.num_running:
            left_s = deadline_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                logger.warning("%d requests did not finish in time", self._state.num_running)
                if self._state.engine is not None:
                    self._state.engine.fail("the server has shut down")
                return
            await asyncio.sleep(min(POLL_S, left_s))


def _on_daemon(work: Callable[[], T]) -> asyncio.Future[T]:
    """Returns the future of `work`'s result, done on a thread that nothing waits for at the end.

    The end of the loop, and of the process, joins the threads of `asyncio.to_thread`: a signal
    would have to wait for a download.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run_and_tell() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run_and_tell, name="load", daemon=True).start()
    return future
