"""Waiting with a limit: what never comes fails a test instead of hanging the run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

WAIT_S = 30.0


def wait_until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Returns as soon as the condition holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


async def until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    """Returns as soon as the condition holds; the event loop goes on meanwhile."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)
