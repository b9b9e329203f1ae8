"""Cuts a conversation that is too long: whole turns go, the oldest first, the instructions stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxserve.errors import PromptTooLong

T = TypeVar("T")
Messages = Sequence[dict[str, Any]]


def build_cut(
    build: Callable[[Messages], T],  # raises PromptTooLong
    messages: Messages,
    fits: Callable[[T], bool],  # also leaves room for an answer
) -> T:
    """Returns what `build` makes of the conversation: all of it if it can be, else its end.

    Turns begin with the user's messages, so no tool's result loses its call. Raises
    `PromptTooLong` if the last turn alone is too long.
    """
    try:
        return build(messages)
    except PromptTooLong as error:
        too_long = error
    head, starts = _turns(messages)

    def attempt(start: int) -> T | None:
        try:
            built = build([*messages[:head], *messages[start:]])
        except PromptTooLong:
            return None
        return built if fits(built) else None

    # Fewer turns are never longer, so halving finds the first cut that fits.
    best, low, high = None, 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        if (built := attempt(starts[middle])) is None:
            low = middle + 1
        else:
            best, high = built, middle
    if best is not None:
        return best
    if not starts:
        raise too_long
    return build([*messages[:head], *messages[starts[-1] :]])


def _turns(messages: Messages) -> tuple[int, list[int]]:
    """Returns how many messages instruct, and where the turns after them begin."""
    roles = [message.get("role") for message in messages]
    head = 0
    while head < len(roles) and roles[head] in ("system", "developer"):
        head += 1
    return head, [index for index, role in enumerate(roles) if role == "user" and index >= head]
