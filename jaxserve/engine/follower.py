"""The end of a process that follows process 0: joins it, takes its steps, notices its loss.

Host only: imports no jax.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Mapping
from typing import Any

from jaxserve.engine.cluster import Place
from jaxserve.engine.link import (
    PROTOCOL,
    End,
    Failed,
    Frame,
    Hello,
    Link,
    Refused,
    Step,
    Value,
    Values,
    Waiting,
    Watch,
    Welcome,
    without_delay,
)
from jaxserve.engine.peers import REPORT_S, RETRY_S, Fate, OnEnd, Report, bracketed
from jaxserve.errors import ConfigError, EngineStopped


class Follower:
    """The end of a process that follows process 0. One thread exchanges and takes steps.

    `on_end` is called once, on any thread, when the cluster ends or cannot go on.
    """

    def __init__(
        self, place: Place, facts: Mapping[str, str], report: Report, on_end: OnEnd
    ) -> None:
        self.place = place
        self.jax_address = ""
        self._facts = facts
        self._report = report
        self._link: Link | None = None
        self._watch: Watch | None = None
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()  # None: no more
        self._fate = Fate(on_end)

    def join(self) -> None:
        """Waits for process 0, and with it for all others. Raises `ConfigError` if refused."""
        place = self.place
        link = self._link = Link(
            without_delay(self._connect()),
            f"process 0 ({place.host})",
            on_frame=self._receive,
            on_end=self._on_link_end,
        )
        self._watch = Watch(lambda: [link], self._fate.settle)
        link.send(Hello(PROTOCOL, place.process_id, place.num_processes, dict(self._facts)))
        link.start()
        while not self.jax_address:
            match self._next_frame():
                case Waiting(line):
                    self._report(line)
                case Refused(reason):
                    raise ConfigError(f"process 0 refused this process: {reason}")
                case Welcome(address):
                    self.jax_address = address

    def exchange(self, value: Any) -> list[Any]:
        """Returns every process's value; raises `EngineStopped` where process 0 is lost."""
        assert self._link is not None
        self._link.send(Value(value))
        frame = self._next_frame()
        assert isinstance(frame, Values), frame
        return frame.values

    def next_step(self) -> Step:
        """Waits for the next step to dispatch; raises `EngineStopped` when there is none."""
        frame = self._next_frame()
        assert isinstance(frame, Step), frame
        return frame

    def explain(self, error: Exception) -> Exception:
        """Returns the loss that caused an error here, else the error, which process 0 is told."""
        if (loss := self._fate.explain()) is not None:
            return loss
        self.end(f"{type(error).__name__}: {error}")
        return error

    def end(self, reason: str | None = None) -> None:
        """Tells process 0 that this process cannot go on, and that is the end for all."""
        if self._fate.claim(reason) and self._link is not None:
            self._link.send(Failed(reason or "it was closed"))

    def _next_frame(self) -> Frame:
        frame = self._frames.get()
        if frame is None:
            raise EngineStopped(self._fate.reason or "the cluster has ended")
        return frame

    def _receive(self, frame: Frame) -> None:
        match frame:
            case End(reason):
                self._fate.settle(reason)
                self._frames.put(None)
            case Refused():
                self._fate.claim(None)
                self._frames.put(frame)
            case _:
                self._frames.put(frame)

    def _on_link_end(self) -> None:
        assert self._link is not None and self._watch is not None
        self._watch.stop()
        self._fate.settle(f"{self._link.peer} was lost: it closed its connection")
        self._frames.put(None)

    def _connect(self) -> socket.socket:
        place = self.place
        where = f"process 0 at {bracketed(place.host)}:{place.port}"
        deadline_s = time.monotonic() + place.join_timeout_s
        said_s = -REPORT_S
        while True:
            try:
                return socket.create_connection((place.host, place.port), timeout=REPORT_S)
            except OSError as error:
                now_s, reason = time.monotonic(), error.strerror or str(error)
            if now_s > deadline_s:
                raise ConfigError(f"{where} did not answer in {place.join_timeout_s:g} s: {reason}")
            if now_s - said_s >= REPORT_S:
                said_s = now_s
                self._report(f"waiting for {where} ({reason})")
            time.sleep(RETRY_S)
