"""How often a stream speaks: `stream_interval` tokens to a chunk, comments in long silences."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from jaxserve.generation import Delta

if TYPE_CHECKING:
    from jaxserve.server.generate import Sample

KEEP_ALIVE = b": keep-alive\n\n"


class Pacer:
    """Holds deltas back until each has `interval` tokens. The first and the last go at once.

    Belongs to one stream.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._held: dict[int, Delta] = {}  # by the sample's index
        self._started: set[int] = set()

    def pass_on(self, news: list[tuple[Sample, Delta]]) -> list[tuple[Sample, Delta]]:
        """Returns what is due of the news and of what was held back."""
        if self._interval <= 1:
            return news
        due = []
        for sample, delta in news:
            held = self._held.pop(sample.index, None)
            delta = delta if held is None else joined(held, delta)
            is_due = (
                delta.finish_reason is not None
                or len(delta.tokens) >= self._interval
                or sample.index not in self._started
            )
            if is_due:
                self._started.add(sample.index)
                due.append((sample, delta))
            else:
                self._held[sample.index] = delta
        return due


def joined(first: Delta, second: Delta) -> Delta:
    """Returns two deltas of one sample as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (*(first.logprobs or ()), *(second.logprobs or ()))
    return second._replace(
        text=first.text + second.text,
        tokens=first.tokens + second.tokens,
        offsets=first.offsets + second.offsets,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
    )


async def kept_alive(
    frames: AsyncGenerator[bytes],
    interval_s: float,  # 0: never
) -> AsyncGenerator[bytes]:
    """Yields the frames, and a comment whenever none has come for `interval_s`.

    Proxies close connections that are silent for long, as one with a queued request is.
    """
    if not interval_s:
        async with contextlib.aclosing(frames):
            async for frame in frames:
                yield frame
        return
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(frames))
            await asyncio.wait({coming}, timeout=interval_s)
            if not coming.done():
                yield KEEP_ALIVE
                continue
            try:
                frame = coming.result()
            except StopAsyncIteration:
                coming = None
                return
            coming = None
            yield frame
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await frames.aclose()
