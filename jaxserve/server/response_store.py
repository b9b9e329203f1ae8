"""The responses that clients may ask for again or go on from: in memory, and no more than fit."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from jaxserve.errors import NotFound


@dataclass(frozen=True, kw_only=True)
class StoredResponse:
    """One response as JSON, and the whole conversation that it ends."""

    response: bytes
    items: bytes  # a list of InputItem

    @property
    def num_bytes(self) -> int:
        """What it counts for."""
        return len(self.response) + len(self.items)


class ResponseStore:
    """Keeps the responses used last, up to a number and a size. The event loop owns it."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()

    @property
    def is_on(self) -> bool:
        """False when the server was told to keep none."""
        return self._max_responses > 0

    def put(self, response_id: str, stored: StoredResponse) -> None:
        """Keeps a response, and drops those that were used longest ago to make room.

        One that is larger than the whole store is not kept.
        """
        if not self.is_on or stored.num_bytes > self._max_bytes:
            return
        self._stored[response_id] = stored
        self._num_bytes += stored.num_bytes
        while len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes:
            _, dropped = self._stored.popitem(last=False)
            self._num_bytes -= dropped.num_bytes

    def get(self, response_id: str, param: str) -> StoredResponse:
        """Returns a response, which is then the one used last. Raises `NotFound`."""
        stored = self._stored.get(response_id)
        if stored is None:
            raise self._unknown(response_id, param)
        self._stored.move_to_end(response_id)
        return stored

    def delete(self, response_id: str, param: str) -> None:
        """Forgets a response. Raises `NotFound`."""
        stored = self._stored.pop(response_id, None)
        if stored is None:
            raise self._unknown(response_id, param)
        self._num_bytes -= stored.num_bytes

    def _unknown(self, response_id: str, param: str) -> NotFound:
        reason = "" if self.is_on else "; this server stores none (max_stored_responses is 0)"
        return NotFound(f"no response has the id {response_id[:200]!r}{reason}", param=param)
