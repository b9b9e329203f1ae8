"""Process 0's end of a cluster: waits for the others, sends them the steps, notices who is lost.

Host only: imports no jax.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxserve.engine.cluster import Place
from jaxserve.engine.info import Report
from jaxserve.engine.link import (
    MAX_GREETING_BYTES,
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
    receive_frame,
    without_delay,
)
from jaxserve.engine.peers import (
    REPORT_S,
    Fate,
    OnEnd,
    bracketed,
    difference,
    differing,
    is_loopback,
)
from jaxserve.errors import ConfigError, EngineStopped

GREETING_S = 2.0
ACCEPT_S = 0.05  # between looks at who is still missing
END_GRACE_S = 3.0  # for the others to leave in order
FAIL_GRACE_S = 0.3  # for the others to hear why


class _Refusal(NamedTuple):
    """Why a process cannot be taken in."""

    reason: str  # for the log
    told: str  # to the process, which may be a stranger's: none of our values


class Leader:
    """Process 0's end. One thread (the engine's) exchanges and sends steps.

    `on_end` is called once, on any thread, when the cluster cannot go on.
    """

    def __init__(
        self, place: Place, facts: Mapping[str, str], report: Report, on_end: OnEnd
    ) -> None:
        self.place = place
        self.jax_address = ""
        self._facts = facts
        self._report = report
        self._links: dict[int, Link] = {}  # by process
        self._lock = threading.Lock()  # guards `_links` while processes come and go
        self._has_started = False
        self._step_started_s: float | None = None
        self._values: dict[int, queue.SimpleQueue[Any]] = {}
        self._on_end = on_end
        self._fate = Fate(self._end_others_and_tell)
        self._watch = Watch(self._known_links, self._fate.settle, self._check_step)

    def join(self) -> None:
        """Waits for all processes. Raises `ConfigError` when some have not come in time."""
        deadline_s = time.monotonic() + self.place.join_timeout_s
        said_s = -REPORT_S
        with _listener(self.place) as listener:
            while missing := self._start_or_missing():
                now_s = time.monotonic()
                if now_s > deadline_s:
                    raise ConfigError(
                        f"{_in_words(missing)} of {self.place.num_processes} did not come in "
                        f"{self.place.join_timeout_s:g} s"
                    )
                if now_s - said_s >= REPORT_S:
                    said_s = now_s
                    self._say(f"waiting for {_in_words(missing)} of {self.place.num_processes}")
                with contextlib.suppress(TimeoutError):
                    sock, address = listener.accept()
                    # Whoever says nothing, or says it slowly, keeps nobody waiting.
                    threading.Thread(
                        target=self._greet, args=(sock, address[0]), name="greet", daemon=True
                    ).start()
            self.jax_address = f"{bracketed(self.place.host)}:{_free_port(listener)}"
        self._report(f"all {self.place.num_processes} processes are there")
        for link in self._known_links():
            link.send(Welcome(self.jax_address))

    def exchange(self, value: Any) -> list[Any]:
        """Returns every process's value; raises `EngineStopped` where one is lost meanwhile."""
        values = [value]
        for process_id in range(1, self.place.num_processes):
            while True:
                with contextlib.suppress(queue.Empty):
                    values.append(self._values[process_id].get(timeout=0.2))
                    break
                if self._fate.is_settled:
                    raise EngineStopped(self._fate.reason or "the cluster has ended")
        for link in self._known_links():
            link.send(Values(values))
        return values

    def send_step(
        self,
        bucket: tuple[int, int],
        blob: bytes,
        extras: bytes | None,
        masks: bytes | None,
    ) -> None:
        """Tells every process to dispatch a step."""
        frame = Step(bucket, blob, extras, masks)
        for link in self._known_links():
            link.send(frame)

    @contextlib.contextmanager
    def step_in_time(self) -> Iterator[None]:
        """Wraps the wait for a step: one that hangs is a loss."""
        self._step_started_s = time.monotonic()
        try:
            yield
        finally:
            self._step_started_s = None

    def explain(self, error: Exception) -> Exception:
        """Returns the loss of a process that caused an error of the engine, else the error.

        An error that is this process's own ends the others.
        """
        if (loss := self._fate.explain()) is not None:
            return loss
        self.end(f"process 0 failed: {type(error).__name__}: {error}")
        return error

    def end(self, reason: str | None = None) -> None:
        """Ends the other processes, in order where there is no reason, and waits a little."""
        if self._fate.claim(reason):
            self._end_others(reason)

    def _end_others_and_tell(self, reason: str | None) -> None:
        self._end_others(reason)
        self._on_end(reason)

    def _end_others(self, reason: str | None) -> None:
        self._watch.stop()
        links = self._known_links()
        for link in links:
            # A peer that stands still must not keep the others from hearing.
            threading.Thread(target=link.send, args=(End(reason),), daemon=True).start()
        deadline_s = time.monotonic() + (END_GRACE_S if reason is None else FAIL_GRACE_S)
        for link in links:
            link.ended.wait(max(0.0, deadline_s - time.monotonic()))

    def _known_links(self) -> list[Link]:
        with self._lock:
            return list(self._links.values())

    def _start_or_missing(self) -> list[int]:
        """Returns who is missing; from the moment that nobody is, nobody may leave."""
        with self._lock:
            missing = self._missing()
            self._has_started = not missing
            return missing

    def _missing(self) -> list[int]:
        return [i for i in range(1, self.place.num_processes) if i not in self._links]

    def _say(self, line: str) -> None:
        self._report(line)
        for link in self._known_links():
            link.send(Waiting(f"process 0 is {line}"))

    def _greet(self, sock: socket.socket, host: str) -> None:
        """Takes a process in, or tells it why not."""
        hello = receive_frame(sock, MAX_GREETING_BYTES, time.monotonic() + GREETING_S)
        if not isinstance(hello, Hello) or hello.protocol != PROTOCOL:
            sock.close()  # a port scanner, or a version that speaks otherwise
            return
        process_id = hello.process_id
        link = Link(
            without_delay(sock),
            f"process {process_id} ({host})",
            on_frame=lambda frame: self._receive(process_id, frame),
            on_end=lambda: self._on_link_end(process_id),
        )
        with self._lock:
            refusal = self._refusal(hello)
            if refusal is None:
                self._report(f"process {process_id} is there ({host})")
                self._links[process_id] = link
                self._values[process_id] = queue.SimpleQueue()
        if refusal is None:
            link.start()
            return
        self._report(f"refused process {process_id} ({host}): {refusal.reason}")
        link.send(Refused(refusal.told))
        link.close()

    def _refusal(self, hello: Hello) -> _Refusal | None:
        """Returns why a process cannot be taken in. Needs the lock."""
        if (reason := self._misplacement(hello)) is not None:
            return _Refusal(reason, reason)
        if (name := differing(hello.facts, self._facts)) is not None:
            told = f"its {name} is not that of process 0, whose log has both"
            return _Refusal(difference(name, hello.facts, self._facts), told)
        return None

    def _misplacement(self, hello: Hello) -> str | None:
        count = self.place.num_processes
        if hello.num_processes != count:
            return f"it has num_processes {hello.num_processes}; process 0 has {count}"
        if not 0 < hello.process_id < count:
            return f"its process_id is {hello.process_id}; 1 to {count - 1} follow process 0"
        if hello.process_id not in self._missing():
            return f"there is a process {hello.process_id} already"
        return None

    def _receive(self, process_id: int, frame: Frame) -> None:
        match frame:
            case Value(value):
                self._values[process_id].put(value)
            case Failed(reason):
                self._fate.settle(f"{self._links[process_id].peer} failed: {reason}")

    def _on_link_end(self, process_id: int) -> None:
        with self._lock:
            link, has_started = self._links[process_id], self._has_started
            if not has_started:
                del self._links[process_id]
        if has_started:
            self._fate.settle(f"{link.peer} was lost: it closed its connection")
        else:
            self._report(f"{link.peer} has left")

    def _check_step(self) -> str | None:
        started_s, limit_s = self._step_started_s, self.place.step_timeout_s
        if started_s is not None and time.monotonic() - started_s > limit_s:
            return f"a step has not finished in {limit_s:g} s (step_timeout)"
        return None


def _listener(place: Place) -> socket.socket:
    """Returns a socket that listens on the coordinator's port. Raises `ConfigError`."""
    host = place.host if is_loopback(place.host) else ""
    is_dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual or ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, place.port), family=family, dualstack_ipv6=is_dual)
    except OSError as error:
        raise ConfigError(
            f"process 0 cannot listen on the coordinator's port {place.port}: {error.strerror}"
        ) from error
    sock.settimeout(ACCEPT_S)
    return sock


def _free_port(listener: socket.socket) -> int:
    """Returns a port that nobody listens on now, where `listener` listens."""
    with socket.socket(listener.family, socket.SOCK_STREAM) as sock:
        sock.bind((listener.getsockname()[0], 0))
        port: int = sock.getsockname()[1]
        return port


def _in_words(processes: list[int]) -> str:
    names = ", ".join(map(str, processes))
    return f"process {names}" if len(processes) == 1 else f"processes {names}"
