"""An engine's life under the HTTP application: loaded when it starts, watched, drained, ended.

Whoever hosts the application (`jaxserve serve`, uvicorn, Ray Serve) starts and ends it through
ASGI's lifespan. Imports no jax.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from starlette.applications import Starlette

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.cluster import check_alone
from jaxserve.engine.ipc import ENGINE_COMMAND, IpcClient
from jaxserve.errors import JaxserveError
from jaxserve.server.app import http_app
from jaxserve.server.model_text import find_model, load_text
from jaxserve.server.state import ServerState
from jaxserve.text.grammar import vocabulary_of

POLL_S = 0.05
# How long a dead server still answers its probes with 503, and its streams with the error.
DEAD_GRACE_S = 2.0

logger = logging.getLogger("jaxserve")

T = TypeVar("T")


def build_app(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> Starlette:
    """Returns the ASGI application that owns an engine process, from lifespan startup to shutdown.

    Startup returns at once, so that probes see a loading server; `app.state.life` tells how the
    loading went. Shutdown waits for the running requests, `shutdown_timeout` at most. The address,
    the time for headers and the log are the affair of whoever hosts the application.
    """
    if engine_command == ENGINE_COMMAND:
        check_alone(server_config)
    state = ServerState(
        config=server_config,
        model_names=server_config.served_model_name or (engine_config.model,),
        root=engine_config.model,
    )
    life = Life(state, engine_config, engine_command)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        life.start()
        try:
            yield
        finally:
            await life.end()

    app = http_app(state, lifespan)
    app.state.life = life
    return app


class Life:
    """One engine from its first moment to its last. Belongs to the event loop."""

    def __init__(
        self, state: ServerState, engine_config: EngineConfig, engine_command: Sequence[str]
    ) -> None:
        self.state = state
        self.is_over = asyncio.Event()  # the engine died or cannot start; `state.failure` says why
        self._loaded = asyncio.Event()
        self._engine_config = engine_config
        self._engine_command = engine_command
        self._living: asyncio.Task[None] | None = None
        self._is_drained = False

    def start(self) -> None:
        """Begins to load; returns at once."""
        self._living = asyncio.create_task(self._live())

    async def wait_ready(self) -> None:
        """Waits until requests are taken. Raises `NotReady` if that will never be."""
        await self._loaded.wait()
        self.state.check_ready()

    async def drain(self) -> None:
        """Refuses new requests and waits for the running ones, as long as the options allow."""
        if self._is_drained:
            return
        state, loop = self.state, asyncio.get_running_loop()
        state.is_draining = self._is_drained = True
        deadline_s = loop.time() + state.config.shutdown_timeout
        while state.num_running:
            left_s = deadline_s - loop.time()
            if left_s <= 0:
                logger.warning("%d requests did not finish in time", state.num_running)
                if state.engine is not None:
                    state.engine.fail("the server has shut down")
                return
            await asyncio.sleep(min(POLL_S, left_s))

    async def end(self) -> None:
        """Drains, unless that is done, and ends the engine process."""
        # What a drain did not wait for is no failure.
        reason = None if self._is_drained else self.state.failure
        await self.drain()
        if self._living is not None:
            self._living.cancel()
            await asyncio.gather(self._living, return_exceptions=True)
        if self.state.engine is not None:
            await self.state.engine.close(reason)

    async def _live(self) -> None:
        try:
            await self._load_and_watch()
        except JaxserveError as error:
            logger.error("%s", error)
            self.state.failure = str(error)
        except Exception as error:
            logger.exception("the server cannot go on")
            self.state.failure = type(error).__name__
        finally:
            self._loaded.set()
            self.is_over.set()

    async def _load_and_watch(self) -> None:
        """Loads the model and watches the engine. Raises when it cannot start or dies."""
        # The text side first finds the files: a download must not happen in both processes.
        state = self.state
        path = await _on_daemon(lambda: find_model(self._engine_config))
        state.engine = await IpcClient.start(
            self._engine_config, report=logger.info, command=self._engine_command
        )
        loading = _on_daemon(lambda: load_text(path, self._engine_config, state.config))
        text, _ = await asyncio.gather(loading, state.engine.wait_ready())
        vocabulary = await _on_daemon(
            lambda: vocabulary_of(text.tokenizer, text.format.thinking_marks)
        )
        if vocabulary is not None:
            state.engine.set_vocabulary(vocabulary)
        state.text = text
        logger.info("serving %s", ", ".join(state.model_names))
        self._loaded.set()
        await state.engine.stopped.wait()
        state.check_alive()


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
