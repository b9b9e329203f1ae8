"""A server over the echo engine: the real IPC, the real HTTP stack, no weights."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.ipc import IpcClient
from jaxserve.engine.process import serve_ipc
from jaxserve.server.app import http_app
from jaxserve.server.http import HttpServer, address_of, bind, http_server
from jaxserve.server.model_text import ModelText
from jaxserve.server.state import ServerState
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.grammar import vocabulary_of
from tests.fakes import EchoEngine, byte_tokenizer


def echo_command(*, load_s: float = 0.0, **options: Any) -> Sequence[str]:
    """Returns the command of an engine process that runs the echo engine."""
    code = (
        "import socket, sys, time;"
        "from jaxserve.engine.process import own_no_signals, serve_ipc;"
        "from tests.fakes import EchoEngine; own_no_signals();"
        f"serve_ipc(socket.socket(fileno=int(sys.argv[1])), lambda config, deliver, report:"
        f" (report('loading'), time.sleep({load_s}), EchoEngine(deliver, **{options!r}))[2])"
    )
    return (sys.executable, "-c", code)


class EchoLink:
    """An IpcClient whose engine runs on a thread of this process, within reach of the test."""

    def __init__(self, **options: Any) -> None:
        self.lines: list[str] = []
        self.engine: EchoEngine
        self._options = options

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[IpcClient]:
        """Connects, waits until ready, and closes."""
        ours, theirs = socket.socketpair()

        def make_engine(config: Any, deliver: Any, report: Any) -> EchoEngine:
            report("loading the echo")
            self.engine = EchoEngine(deliver, **self._options)
            return self.engine

        thread = threading.Thread(target=serve_ipc, args=(theirs, make_engine), daemon=True)
        thread.start()
        client = await IpcClient.connect(ours, EngineConfig(), report=self.lines.append)
        await client.wait_ready()
        try:
            yield client
        finally:
            await client.close()
            await asyncio.to_thread(thread.join)
            theirs.close()


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


class EchoServer:
    """The whole front on a thread, listening on a free port, over an echo engine."""

    def __init__(self, config: ServerConfig | None = None, **options: Any) -> None:
        self.link = EchoLink(**options)
        self.state = ServerState(
            config=config or ServerConfig(), model_names=("echo", "alias"), root="echo"
        )
        self.url = ""
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._server: HttpServer | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> EchoServer:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        sock = bind("127.0.0.1", 0)
        self.url, self.port = address_of(sock), sock.getsockname()[1]
        self._server = http_server(http_app(self.state), self.state.config)
        async with self.link.client() as client:
            self.state.engine = client
            tokenizer = byte_tokenizer()
            client.set_vocabulary(vocabulary_of(tokenizer))
            self.state.text = ModelText(
                tokenizer=tokenizer, chat_template=ChatTemplate(CHAT_TEMPLATE), defaults={}
            )
            serving = asyncio.create_task(self._server.serve(sockets=[sock]))
            while not self._server.started:
                await asyncio.sleep(0.001)
            self._started.set()
            await serving
