"""What a request may cost before it is understood: headers, body size, body time."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope

from jaxserve.errors import BodyTooLarge, RequestError, SlowBody

MAX_HEADERS = 100
MAX_HEADER_BYTES = 65536


def check_headers(scope: Scope, max_body_bytes: int) -> None:
    """Raises `RequestError` for too many headers, `BodyTooLarge` for a body announced too large."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    num_bytes = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or num_bytes > MAX_HEADER_BYTES:
        raise RequestError(
            f"the request has {len(headers)} headers of {num_bytes} bytes; "
            f"the limits are {MAX_HEADERS} and {MAX_HEADER_BYTES}"
        )
    for name, value in headers:
        if name == b"content-length" and value.isdigit() and int(value) > max_body_bytes:
            raise BodyTooLarge(f"the body has {int(value)} bytes; the limit is {max_body_bytes}")


class LimitedBody:
    """A `receive` that raises when the body is too large or too slow; then it only listens."""

    def __init__(self, receive: Receive, max_bytes: int, timeout_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._num_bytes = 0
        self._is_complete = False

    async def __call__(self) -> Message:
        """Returns the next message of the request."""
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError:
            raise SlowBody(f"the body did not arrive within {self._timeout_s:g} s") from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
        if self._num_bytes > self._max_bytes:
            raise BodyTooLarge(f"the body has more than {self._max_bytes} bytes, the limit")
        return message
