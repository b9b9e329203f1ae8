"""The end of a process that follows process 0: joins it, takes its steps, notices its loss.

Host only: imports no jax.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.engine.cluster import Place
from jaxserve.engine.frames import MAX_FRAME_BYTES
from jaxserve.engine.info import Report
from jaxserve.engine.link import (
    PROTOCOL,
    Beat,
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
    receive_frame,
    send_frame,
    without_delay,
)
from jaxserve.engine.peers import REPORT_S, RETRY_S, Fate, OnEnd, bracketed
from jaxserve.errors import ConfigError, EngineStopped


class Follower:
    """The end of a process that follows process 0. One thread exchanges and takes steps.

    `on_heard` is called when process 0 has been heard, which ends this process from then on.
    `on_end` is called once, on any thread, when the cluster ends or cannot go on.
    """

    def __init__(
        self,
        place: Place,
        facts: Mapping[str, str],
        report: Report,
        on_end: OnEnd,
        *,
        on_heard: Callable[[], None] = lambda: None,
    ) -> None:
        self.place = place
        self.jax_address = ""
        self._facts = facts
        self._report = report
        self._link: Link | None = None
        self._watch: Watch | None = None
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()  # None: no more
        self._fate = Fate(on_end)
        self._on_heard = on_heard

    def join(self) -> None:
        """Waits for process 0, and with it for all others. Raises `ConfigError` if refused."""
        deadline_s = time.monotonic() + self.place.join_timeout_s
        sock = without_delay(self._connect(deadline_s))
        first = self._greet(sock, deadline_s)
        if isinstance(first, Refused):
            sock.close()
            raise ConfigError(f"process 0 refused this process: {first.reason}")
        self._on_heard()
        link = self._link = Link(
            sock,
            f"process 0 ({self.place.host})",
            on_frame=self._receive,
            on_end=self._on_link_end,
        )
        self._watch = Watch(lambda: [link], self._fate.settle)
        self._receive(first)
        link.start()
        while not self.jax_address:
            match self._next_frame():
                case Waiting(line):
                    self._report(line)
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
            case Beat():
                pass
            case _:
                self._frames.put(frame)

    def _on_link_end(self) -> None:
        assert self._link is not None and self._watch is not None
        self._watch.stop()
        self._fate.settle(f"{self._link.peer} was lost: it closed its connection")
        self._frames.put(None)

    def _greet(self, sock: socket.socket, deadline_s: float) -> Frame:
        """Says who this process is; returns process 0's first frame.

        Nothing else is sent before that: what comes first must be the greeting. And until then
        silence is no loss, for process 0 may have much to do.
        """
        place = self.place
        hello = Hello(PROTOCOL, place.process_id, place.num_processes, dict(self._facts))
        first = None
        with contextlib.suppress(OSError):
            send_frame(sock, hello)
            first = receive_frame(sock, MAX_FRAME_BYTES, deadline_s)
        if first is None:
            sock.close()
            if time.monotonic() >= deadline_s:
                raise ConfigError(f"{self._where} said nothing in {place.join_timeout_s:g} s")
            raise EngineStopped(
                f"{self._where} closed its connection: it has ended, or is of another version"
            )
        return first

    @property
    def _where(self) -> str:
        return f"process 0 at {bracketed(self.place.host)}:{self.place.port}"

    def _connect(self, deadline_s: float) -> socket.socket:
        place, where = self.place, self._where
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
