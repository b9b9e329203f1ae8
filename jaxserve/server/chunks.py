"""The chunks of a stream, written around their constant parts: a token costs one short dumps."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import orjson

from jaxserve.errors import EngineStopped
from jaxserve.generation import Delta
from jaxserve.server.events import DONE, error_body, event
from jaxserve.server.generate import Generation, Sample
from jaxserve.server.pacing import Pacer
from jaxserve.server.protocol.common import StreamOptions

_PLAIN = b',"logprobs":null,"finish_reason":null,"stop_reason":null'


class ChunkWriter:
    """Writes the chunks of one reply.

    For completions a chunk is put together from `data: {"id":"cmpl-1",...,"choices":[{"index":0`
    with `,"text":` at its end, then `"Hi"`, `,"logprobs":null,...` and `}]}`.
    """

    def __init__(
        self,
        generation: Generation,
        options: StreamOptions,
        *,
        reply_id: str,
        created: int,
        model: str,
        kind: str,  # the chunk's "object"
        text_start: bytes,
        text_end: bytes,
        interval: int = 1,  # tokens to a chunk
    ) -> None:
        self._interval = interval
        self._generation = generation
        self._has_last_usage = bool(options.include_usage)
        self._has_usage = bool(options.continuous_usage_stats)
        self._head = b'data: {"id":%b,"object":%b,"created":%d,"model":%b' % (
            orjson.dumps(reply_id),
            orjson.dumps(kind),
            created,
            orjson.dumps(model),
        )
        self._starts = [
            b'%b,"choices":[{"index":%d%b' % (self._head, index, text_start)
            for index in range(len(generation.samples))
        ]
        self._text_end = text_end
        self._end = b'}],"usage":null}\n\n' if self._has_last_usage else b"}]}\n\n"
        self._plain_end = text_end + _PLAIN + self._end

    def plain(self, index: int, text: str) -> bytes:
        """Returns a chunk with text and nothing else."""
        if self._has_usage:
            return self.full(index, text, {"logprobs": None, "finish_reason": None})
        return self._starts[index] + orjson.dumps(text) + self._plain_end

    def full(
        self,
        index: int,
        text: str,
        fields: Mapping[str, Any],  # the choice's other fields
    ) -> bytes:
        """Returns a chunk with more than text."""
        # The braces of fields go: its members join the choice's.
        choice = orjson.dumps(text) + self._text_end + b"," + orjson.dumps(fields)[1:-1]
        return self._starts[index] + choice + self._end_now()

    def without_text(
        self,
        index: int,
        fields: Mapping[str, Any],  # all of the choice's fields but the index
        outer: Mapping[str, Any] | None = None,  # the chunk's other fields
    ) -> bytes:
        """Returns a chunk made of other fields."""
        choice = b',"choices":[{"index":%d,%b' % (index, orjson.dumps(fields)[1:-1])
        more = b"," + orjson.dumps(outer)[1:-1] if outer else b""
        return self._head + more + choice + self._end_now()

    def _end_now(self) -> bytes:
        if not self._has_usage:
            return self._end
        return b'}],"usage":%b}\n\n' % orjson.dumps(self._generation.usage)

    async def stream(self, write: Callable[[Sample, Delta], bytes]) -> AsyncGenerator[bytes]:
        """Yields whole events: what is new in one piece, usage when asked for, [DONE].

        An engine failure is told in an event of its own, and no [DONE] follows.
        """
        pacer = Pacer(self._interval)
        try:
            async with contextlib.aclosing(self._generation.deltas()) as deltas:
                async for news in deltas:
                    news = pacer.pass_on(news)
                    if frame := b"".join([write(sample, delta) for sample, delta in news]):
                        yield frame
        except EngineStopped as error:
            yield event({"error": error_body(error)})
            return
        if self._has_last_usage:
            usage = orjson.dumps(self._generation.usage)
            yield b'%b,"choices":[],"usage":%b}\n\n' % (self._head, usage)
        yield DONE
