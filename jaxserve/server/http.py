"""uvicorn as a part: our signals, and connections that must send their headers in time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError

CLOSE_GRACE_S = 5


class HttpServer(uvicorn.Server):
    """A uvicorn server that leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures nothing: `server.main` owns the signals."""
        yield


def http_server(app: ASGIApp, config: ServerConfig) -> HttpServer:
    """Returns the server of `app`; `serve(sockets=[...])` runs it."""
    return HttpServer(
        uvicorn.Config(
            app,
            # httptools would be chosen where it is installed, and it bounds no header.
            http=protocol_for(config.header_timeout_s),
            h11_max_incomplete_event_size=65536,
            ws="none",
            lifespan="on",
            server_header=False,
            proxy_headers=False,
            log_config=None,
            access_log=config.log_level == "debug",
            timeout_graceful_shutdown=CLOSE_GRACE_S,
        )
    )


def protocol_for(header_timeout_s: float) -> type[H11Protocol]:
    """Returns the HTTP protocol that closes a connection whose headers take too long."""

    class GuardedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._guard: asyncio.TimerHandle | None = None
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.conn.their_state is h11.IDLE:
                self._arm()
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._disarm()

        def _arm(self) -> None:
            if self._guard is None:
                self._guard = self.loop.call_later(header_timeout_s, self.transport.close)

        def _disarm(self) -> None:
            if self._guard is not None:
                self._guard.cancel()
                self._guard = None

    return GuardedProtocol


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket; port 0 picks a free one. Raises `ConfigError`.

    Two sockets of one address can both be bound as long as neither listens.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it on, every
    # second write on a connection waits 40 ms for an acknowledgement.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen()
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return sock


def address_of(sock: socket.socket) -> str:
    """Returns the URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
