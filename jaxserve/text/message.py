"""What is new of a message: reasoning, content, tool calls.

Host only: imports no jax.
"""

from __future__ import annotations

from typing import NamedTuple


class CallDelta(NamedTuple):
    """What is new of one tool call. The first delta of a call has its id and name."""

    number: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Said(NamedTuple):
    """What is new of a message."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
