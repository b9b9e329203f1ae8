"""Server-sent events, and work that ends when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any, TypeAlias, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.errors import JaxserveError

T = TypeVar("T")
Event: TypeAlias = dict[str, Any]  # of a protocol whose events have a `type`

DONE = b"data: [DONE]\n\n"
MAX_MESSAGE = 2000


class JSON(Response):
    """A JSON reply; dataclasses are written as objects."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Returns the bytes of the body."""
        return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)


def event(content: Any) -> bytes:
    """Returns one server-sent event."""
    return b"data: %b\n\n" % orjson.dumps(content)


def named_events(contents: Iterable[Event]) -> bytes:
    """Returns server-sent events whose names are the contents' types."""
    return b"".join(
        [
            b"event: %b\ndata: %b\n\n" % (item["type"].encode(), orjson.dumps(item))
            for item in contents
        ]
    )


def error_body(error: Exception) -> dict[str, Any]:
    """Returns the OpenAI error object; an error that was not raised on purpose tells nothing."""
    if not isinstance(error, JaxserveError):
        error = JaxserveError("internal server error")
    return {
        "message": str(error)[:MAX_MESSAGE],
        "type": error.code,
        "param": getattr(error, "param", None),
        "code": error.status,
    }


class EventStream(Response):
    """Server-sent events. Closes `frames` and aborts `updates` however the response ends."""

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes],  # each item is whole events
        updates: contextlib.AbstractAsyncContextManager[Any],  # what the frames are made from
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", **(headers or {})})
        del self.headers["content-length"]
        self._frames = frames
        self._updates = updates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end or the client leaves."""
        # A generator that never started runs no `finally`: the updates are closed here.
        async with self._updates:
            with contextlib.suppress(ClientDisconnect):
                await while_connected(receive, self._send_frames(send))

    async def _send_frames(self, send: Send) -> None:
        async with contextlib.aclosing(self._frames):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for frame in self._frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the work's result. Cancels it and raises `ClientDisconnect` if the client leaves.

    The body must have been read: what is received now can only be the disconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
