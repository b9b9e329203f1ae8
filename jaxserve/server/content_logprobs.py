"""Sorts out which log-probabilities are those of an answer's content."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from jaxserve.generation import PositionLogprobs
from jaxserve.text.message import MessageReader


class ContentLogprobs:
    """Follows one sample. Holds tokens back until their reader knows what they are."""

    def __init__(self, reader: MessageReader | None) -> None:
        self._reader = reader  # None: all is content
        self._held: deque[PositionLogprobs] = deque()

    def push(self, positions: Sequence[PositionLogprobs]) -> list[PositionLogprobs]:
        """Returns those that have become content, once the reader has read the same tokens."""
        reader = self._reader
        if reader is None:
            return list(positions)
        self._held.extend(positions)
        known = []
        while self._held and self._held[0].offset < reader.num_read:
            position = self._held.popleft()
            if reader.is_content(position.offset):
                known.append(position)
        return known
