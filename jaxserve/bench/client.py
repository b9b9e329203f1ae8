"""A small HTTP client for streams: one connection for each request, parsed as bytes arrive.

It shares its cores with the server that it measures, so it does as little as it can: an asyncio
protocol without a stream reader, and one JSON decode for each event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from jaxserve.address import Server


class EventParser:
    """Takes the bytes of one HTTP/1.1 response and gives back the `data:` of its events.

    Holds at most one incomplete head, chunk or line. Owned by one connection.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.is_done = False  # the body has ended
        self.body = bytearray()  # of a response that is no event stream, such as an error
        self._raw = bytearray()
        self._line = bytearray()
        self._is_chunked = False
        self._is_stream = False
        self._length: int | None = None
        self._chunk: int | None = None  # bytes of the chunk still to come, its CRLF included

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the payloads of the events that `data` completes."""
        self._raw += data
        if self.status is None and not self._read_head():
            return []
        body = self._take_chunks() if self._is_chunked else self._take_plain()
        if not self._is_stream:
            self.body += body
            return []
        self._line += body
        *lines, rest = self._line.split(b"\n")
        self._line = bytearray(rest)
        return [bytes(line[5:].strip()) for line in lines if line.startswith(b"data:")]

    def _read_head(self) -> bool:
        head, end, rest = self._raw.partition(b"\r\n\r\n")
        if not end:
            return False
        self._raw = rest
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split(" ", 2)[1])
        for line in lines[1:]:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip().lower()
            if name == "transfer-encoding":
                self._is_chunked = value == "chunked"
            elif name == "content-length":
                self._length = int(value)
            elif name == "content-type":
                self._is_stream = value.startswith("text/event-stream")
        return True

    def _take_plain(self) -> bytes:
        body, self._raw = bytes(self._raw), bytearray()
        if self._length is not None:
            self._length -= len(body)
            self.is_done = self._length <= 0
        return body

    def _take_chunks(self) -> bytes:
        body = bytearray()
        while not self.is_done:
            if self._chunk is None:
                size, end, rest = self._raw.partition(b"\r\n")
                if not end:
                    break
                self._raw = rest
                self._chunk = int(size.split(b";")[0], 16) + 2
                # The last chunk is empty; trailers may follow and are of no interest.
                self.is_done = self._chunk == 2
                continue
            if len(self._raw) < self._chunk:
                break
            body += self._raw[: self._chunk - 2]
            del self._raw[: self._chunk]
            self._chunk = None
        return bytes(body)


class _Exchange(asyncio.Protocol):
    """One request and its response, on the event loop's thread."""

    def __init__(self, request: bytes, on_event: Callable[[float, bytes], None]) -> None:
        self.done: asyncio.Future[EventParser] = asyncio.get_running_loop().create_future()
        self._request = request
        self._on_event = on_event
        self._parser = EventParser()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sends the request."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Passes on the events that arrived, all with the time of arrival."""
        now = time.perf_counter()
        try:
            for event in self._parser.feed(data):
                self._on_event(now, event)
        except ValueError as error:
            self._finish(ConnectionError(f"the response is not HTTP or JSON: {error}"))
        if self._parser.is_done:
            self._finish(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Ends the exchange; a response without a stated length ends here as it should."""
        self._finish(error)

    def _finish(self, error: Exception | None) -> None:
        if not self.done.done():
            if error is not None:
                self.done.set_exception(error)
            elif self._parser.status is None:
                self.done.set_exception(ConnectionError("the server closed the connection"))
            else:
                self.done.set_result(self._parser)
        if self._transport is not None:
            self._transport.close()


async def exchange(
    server: Server,
    path: str,
    body: bytes | None = None,
    *,
    on_event: Callable[[float, bytes], None] = lambda now, event: None,
) -> EventParser:
    """Sends one request (POST with a body, else GET) and returns its response when it has ended.

    `on_event` gets the arrival time (`time.perf_counter`) and payload of each server-sent event.
    Raises `OSError` when the connection fails.
    """
    post = b"" if body is None else body
    kind = f"Content-Type: application/json\r\nContent-Length: {len(post)}\r\n"
    head = (
        f"{'GET' if body is None else 'POST'} {server.path}{path} HTTP/1.1\r\n"
        f"{_common_headers(server)}{'' if body is None else kind}\r\n"
    )
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(
        lambda: _Exchange(head.encode() + post, on_event),
        server.host,
        server.port,
        ssl=server.is_tls or None,
    )
    try:
        return await protocol.done
    finally:
        transport.close()


def _common_headers(server: Server) -> str:
    key = f"Authorization: Bearer {server.api_key}\r\n" if server.api_key else ""
    return f"Host: {server.host}:{server.port}\r\nConnection: close\r\n{key}"
