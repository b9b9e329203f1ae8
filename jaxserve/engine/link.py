"""One TCP connection between process 0 and another: frames both ways, and the peer's silence.

Nothing is encrypted and nobody is authenticated, as with jax's own coordinator: a private network
is needed. Host only: imports no jax.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from jaxserve.engine.frames import LENGTH, MAX_FRAME_BYTES, frame_of

MAX_GREETING_BYTES = 2**16  # from a peer that is not known yet
BEAT_S = 1.0
LOST_S = 5.0  # silence that means a peer is lost
PROTOCOL = "jaxserve-cluster-2"


class Hello(msgspec.Struct, array_like=True, tag=True):
    """A process's first frame: who it is, and what must be the same everywhere."""

    protocol: str
    process_id: int
    num_processes: int
    facts: dict[str, str]


class Refused(msgspec.Struct, array_like=True, tag=True):
    """Process 0's answer to a process that does not belong to it."""

    reason: str


class Waiting(msgspec.Struct, array_like=True, tag=True):
    """Process 0 still waits for others: a line for the log."""

    line: str


class Welcome(msgspec.Struct, array_like=True, tag=True):
    """All are there: where process 0 runs jax's coordinator."""

    jax_address: str


class Beat(msgspec.Struct, array_like=True, tag=True):
    """The sender lives."""


class Value(msgspec.Struct, array_like=True, tag=True):
    """What one process brings to an exchange, for process 0."""

    value: Any


class Values(msgspec.Struct, array_like=True, tag=True):
    """What all processes brought to an exchange, in their order."""

    values: list[Any]


class Step(msgspec.Struct, array_like=True, tag=True):
    """A step that every process dispatches now."""

    bucket: tuple[int, int]  # tokens, rows
    blob: bytes  # [ranks, blob_layout.size] i32
    extras: bytes | None  # [ranks, extras_layout.size] i32
    masks: bytes | None  # [ranks * rows, ceil(vocab / 32)] i32, of grammars


class End(msgspec.Struct, array_like=True, tag=True):
    """The end for all: in order where there is no reason."""

    reason: str | None


class Failed(msgspec.Struct, array_like=True, tag=True):
    """A process cannot go on, and so none can."""

    reason: str


Frame = Hello | Refused | Waiting | Welcome | Beat | Value | Values | Step | End | Failed

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


class Link:
    """Owns one connection. Any thread sends; a thread of its own reads and calls back.

    `on_frame` gets every frame but beats; `on_end` is called once, when the peer has closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,  # in words
        *,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[], None],
    ) -> None:
        self.peer = peer
        self.heard_s = time.monotonic()  # when the peer was heard last
        self.ended = threading.Event()
        self._sock = sock
        self._on_frame = on_frame
        self._on_end = on_end
        self._sending = threading.Lock()
        sock.settimeout(None)
        self._reader = threading.Thread(target=self._read, name="link-read", daemon=True)

    def start(self) -> None:
        """Begins to read."""
        self._reader.start()

    def send(self, frame: Frame) -> None:
        """Sends a frame, waiting where the peer does not take it; a peer that left is ignored."""
        # Whoever reads notices that the peer has left, and says so once.
        with self._sending, contextlib.suppress(OSError):
            send_frame(self._sock, frame)

    def beat(self) -> None:
        """Says that this process lives, unless a frame on its way says so."""
        if self._sending.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    send_frame(self._sock, Beat())
            finally:
                self._sending.release()

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self) -> None:
        while (frame := receive_frame(self._sock, MAX_FRAME_BYTES)) is not None:
            self.heard_s = time.monotonic()
            if not isinstance(frame, Beat):
                self._on_frame(frame)
        self.ended.set()
        self._on_end()
        self._sock.close()


def send_frame(sock: socket.socket, frame: Frame) -> None:
    """Sends one frame, whole; raises OSError where that cannot be."""
    sock.sendall(frame_of(_encoder.encode(frame)))


def receive_frame(
    sock: socket.socket,
    limit: int,  # of bytes
    deadline_s: float | None = None,  # by the monotonic clock, for the whole of the frame
) -> Frame | None:
    """Returns the next frame; None at the end, after an error, and for what is no frame."""
    try:
        head = _receive(sock, LENGTH.size, deadline_s)
        if head is None or (size := LENGTH.unpack(head)[0]) > limit:
            return None
        body = _receive(sock, size, deadline_s)
        frame: Frame | None = None if body is None else _decoder.decode(body)
        return frame
    except (OSError, msgspec.MsgspecError):
        return None


def _receive(sock: socket.socket, size: int, deadline_s: float | None) -> bytearray | None:
    body = bytearray(size)
    view, count = memoryview(body), 0
    while count < size:
        if deadline_s is not None:
            sock.settimeout(max(1e-3, deadline_s - time.monotonic()))
        received = sock.recv_into(view[count:])
        if not received:
            return None
        count += received
    return body


def without_delay(sock: socket.socket) -> socket.socket:
    """Returns the socket, which from now on sends small frames at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Watch:
    """A thread that sends beats on links and reports the first peer that is silent too long."""

    def __init__(
        self,
        links: Callable[[], list[Link]],
        on_lost: Callable[[str], None],  # gets why
        check: Callable[[], str | None] = lambda: None,  # returns what else is wrong
    ) -> None:
        self._links = links
        self._on_lost = on_lost
        self._check = check
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread soon."""
        self._stopped.set()

    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._stopped.wait(BEAT_S / 2):
            now_s = time.monotonic()
            # A process that stood still itself has frames to read before it may judge others.
            is_awake, last_s = now_s - last_s < 2 * BEAT_S, now_s
            for link in self._links():
                link.beat()
                if is_awake and now_s - link.heard_s > LOST_S and not link.ended.is_set():
                    self._on_lost(f"{link.peer} was lost: not heard from for {LOST_S:.0f} s")
                    return
            if is_awake and (reason := self._check()) is not None:
                self._on_lost(reason)
                return
