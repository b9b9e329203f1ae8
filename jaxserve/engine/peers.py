"""What both ends of a cluster share: process 0, which leads, and the others, which follow.

Process 0 listens; the others connect, say who they are and what must be the same everywhere. When
all are there each starts jax. From then on the connections carry what the processes must agree on,
the steps, and the beats that show who is lost. Host only: imports no jax.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxserve.engine.cluster import Place
from jaxserve.errors import EngineStopped

REPORT_S = 5.0  # between lines about who is missing
RETRY_S = 0.2
EXPLAIN_S = 6.0  # until a lost process is known to be lost
_MAX_SHOWN = 200  # characters of a value

OnEnd = Callable[[str | None], None]  # gets why the cluster cannot go on; None: it ended in order


class Peers(Protocol):
    """What loading needs of either end."""

    @property
    def place(self) -> Place:
        """This process's."""

    @property
    def jax_address(self) -> str:
        """Where jax's coordinator is."""

    def exchange(self, value: Any) -> list[Any]:
        """Waits until every process has brought its value; returns all, in the same order."""


class Fate:
    """How the cluster ended, settled once. Any thread may settle and ask."""

    def __init__(self, on_end: OnEnd) -> None:
        self.reason: str | None = None  # why it cannot go on; None while it can, and in order
        self.is_settled = False
        self._known = threading.Event()
        self._on_end = on_end
        self._lock = threading.Lock()

    def claim(self, reason: str | None) -> bool:
        """Settles it in silence; False where that was done before."""
        with self._lock:
            if self.is_settled:
                return False
            self.is_settled, self.reason = True, reason
        self._known.set()
        return True

    def settle(self, reason: str | None) -> None:
        """Settles it and tells, unless that was done before."""
        if self.claim(reason):
            self._on_end(reason)

    def explain(self) -> EngineStopped | None:
        """Returns what ended the cluster, if that is known soon: errors run ahead of it."""
        self._known.wait(EXPLAIN_S)
        return EngineStopped(self.reason) if self.reason is not None else None


def differing(
    facts: Mapping[str, str],  # another process's, which may be a stranger's
    ours: Mapping[str, str],
) -> str | None:
    """Returns the name of the first thing in which another process differs from process 0."""
    return next((name for name in ours if facts.get(name) != ours[name]), None)


def difference(name: str, facts: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Returns in words, on one line, how another process differs from process 0 in `name`."""
    theirs = "missing" if name not in facts else _quoted(facts[name])
    return f"its {name} is {theirs}; process 0 has {_quoted(ours[name])}"


def _quoted(value: str) -> str:
    return repr(value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}...")


def is_loopback(host: str) -> bool:
    """Returns whether only processes of this machine reach `host`."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def bracketed(host: str) -> str:
    """Returns a host as an address with a port has it."""
    return f"[{host}]" if ":" in host else host
