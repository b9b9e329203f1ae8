"""The engine's process: reads the front's frames, runs an engine, sends back what it delivers.

`python -m jaxserve.engine.process FD` is how the front starts it. Imports no jax before `main`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from jaxserve.config import EngineConfig, from_table
from jaxserve.engine.cluster import Place
from jaxserve.engine.frames import LENGTH
from jaxserve.engine.info import EngineInfo, EngineStats, Report
from jaxserve.engine.member import Member
from jaxserve.engine.request import Request, Update
from jaxserve.engine.wire import (
    Abort,
    Admitted,
    AskStats,
    Close,
    Died,
    Ended,
    Joined,
    Prepare,
    Progress,
    Ready,
    RequestFrame,
    SetVocabulary,
    Start,
    Stats,
    Submit,
    ToEngine,
    ToFront,
    Updates,
    engine_decoder,
    pack_frame,
    unpack_request,
)
from jaxserve.errors import EngineStopped, JaxserveError, RequestError
from jaxserve.structured_outputs import Grammar, Vocabulary

CLOSE_GRACE_S = 10.0
_NUM_PREPARING = 4  # grammars that are waited for at once; further ones queue


class Engine(Protocol):
    """What the engine's side needs of an engine: `jaxserve.engine.client.EngineClient`."""

    @property
    def info(self) -> EngineInfo:
        """What was loaded."""

    @property
    def error(self) -> BaseException | None:
        """What ended the engine, if not `close`."""

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Learns what tokens are made of, which grammars need."""

    def prepare(self, grammar: Grammar) -> None:
        """Compiles a grammar or raises `RequestError`; may block for seconds."""

    def submit(self, request: Request) -> None:
        """Admits a request or raises `QueueFull` or `EngineStopped`."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests; unknown ones are ignored."""

    def stats(self) -> EngineStats:
        """Returns the counters."""

    def close(self) -> None:
        """Stops the engine."""


Deliver = Callable[[list[Update]], None]
MakeEngine = Callable[[EngineConfig, Deliver, Report], Engine]


class Outbox:
    """Frames on their way to the front. Any thread puts; one thread writes what has queued."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="ipc-write", daemon=True)
        self._thread.start()

    def put(self, message: ToFront) -> None:
        """Queues a frame; never blocks."""
        self._frames.put(pack_frame(message))

    def put_updates(self, updates: list[Update]) -> list[str]:
        """Queues updates in one frame, or in more if they are too large for one.

        An update that is too large alone fails its request; returns the ids of such requests.
        """
        try:
            self.put(Updates(updates))
        except RequestError as error:
            if len(updates) == 1:
                failed = updates[0].request_id
                self.put(Updates([Update(request_id=failed, error=str(error))]))
                return [failed]
            middle = len(updates) // 2
            return self.put_updates(updates[:middle]) + self.put_updates(updates[middle:])
        return []

    def close(self) -> None:
        """Writes what has queued and ends the thread."""
        self._frames.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_GRACE_S)

    def _write(self) -> None:
        # The reader thread notices a front that has left; here it only ends the writing.
        with contextlib.suppress(OSError):
            while (frame := self._frames.get()) is not None:
                self._sock.sendall(frame)


def serve_ipc(
    sock: socket.socket,
    make_engine: MakeEngine,
    *,
    outbox: Outbox | None = None,
    on_close: Callable[[Close | None], None] = lambda message: None,
) -> None:
    """Serves one front until it closes or dies; the engine loads on a thread of its own.

    `make_engine` is called with the options, `deliver` (takes one step's updates, never blocks)
    and `report` (takes a line about loading). `on_close` is called before the engine is closed,
    with None where the front is lost.
    """
    frames = sock.makefile("rb")
    outbox = outbox or Outbox(sock)
    start = _read_frame(frames)
    if not isinstance(start, Start):
        return
    engines: list[Engine] = []
    loading = (start.config, make_engine, engines, outbox)
    threading.Thread(target=_load, args=loading, name="engine-load", daemon=True).start()
    preparing = ThreadPoolExecutor(_NUM_PREPARING, thread_name_prefix="prepare")
    while (message := _read_frame(frames)) is not None and not isinstance(message, Close):
        if not engines:
            continue
        if isinstance(message, Prepare):
            # Others' requests must not wait for a compiler.
            preparing.submit(_prepare, message, engines[0], outbox)
        else:
            _obey(message, engines[0], outbox)
    preparing.shutdown(wait=False, cancel_futures=True)
    on_close(message if isinstance(message, Close) else None)
    if engines:
        engines[0].close()
    outbox.close()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _load(
    config: dict[str, Any],
    make_engine: MakeEngine,
    engines: list[Engine],  # empty until the engine takes requests
    outbox: Outbox,
) -> None:
    def deliver(updates: list[Update]) -> None:
        failed = outbox.put_updates(updates)
        if failed and engines:
            engines[0].abort(failed)
        if engines and (not updates or any(update.error is not None for update in updates)):
            _report_death(engines[0], outbox)

    try:
        engine = make_engine(
            from_table(EngineConfig, config), deliver, lambda line: outbox.put(Progress(line))
        )
    except Exception as error:
        if not isinstance(error, JaxserveError):
            traceback.print_exception(error)
        outbox.put(Died(type(error).__name__, str(error) or type(error).__name__))
    else:
        engines.append(engine)
        outbox.put(Ready(engine.info))


def _report_death(engine: Engine, outbox: Outbox) -> None:
    """Tells the front, and the log, if the engine has died; a request alone may fail, too."""
    if engine.error is not None:
        traceback.print_exception(engine.error)
        outbox.put(Died("EngineStopped", f"{type(engine.error).__name__}: {engine.error}"))


def _read_frame(frames: Any) -> ToEngine | None:
    """Returns the next message; None when the front has gone."""
    try:
        head = frames.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        (size,) = LENGTH.unpack(head)
        if len(body := frames.read(size)) < size:
            return None
    except OSError:
        return None
    message: ToEngine = engine_decoder.decode(body)
    return message


def _obey(message: ToEngine, engine: Engine, outbox: Outbox) -> None:
    match message:
        case SetVocabulary(vocabulary):
            engine.set_vocabulary(vocabulary)
        case Submit(call, frames):
            outbox.put(_admit(call, frames, engine, outbox))
        case Abort(request_ids):
            engine.abort(request_ids)
        case AskStats(call):
            try:
                outbox.put(Stats(call, engine.stats()))
            except EngineStopped as error:
                outbox.put(Died("EngineStopped", str(error)))


def _admit(call: int, frames: list[RequestFrame], engine: Engine, outbox: Outbox) -> Admitted:
    admitted: list[str] = []
    try:
        for frame in frames:
            engine.submit(unpack_request(frame))
            admitted.append(frame.request_id)
    except JaxserveError as error:
        engine.abort(admitted)
        return _refused(call, error, outbox)
    return Admitted(call)


def _prepare(message: Prepare, engine: Engine, outbox: Outbox) -> None:
    try:
        engine.prepare(message.grammar)
    except JaxserveError as error:
        outbox.put(_refused(message.call, error, outbox))
    except Exception as error:  # a bug: whoever waits for the answer must not wait for ever
        traceback.print_exception(error)
        outbox.put(Admitted(message.call, "EngineStopped", f"{type(error).__name__}: {error}"))
    else:
        outbox.put(Admitted(message.call))


def _refused(call: int, error: JaxserveError, outbox: Outbox) -> Admitted:
    if isinstance(error, EngineStopped):
        outbox.put(Died("EngineStopped", str(error)))
    return Admitted(call, type(error).__name__, str(error), getattr(error, "param", None))


def own_no_signals() -> None:
    """Leaves the signals to the front, which drains first; its death is an end of file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main() -> None:
    """Runs the engine process.

    The arguments are its place in a cluster, if it has one, and the file descriptor of its socket.
    """
    own_no_signals()
    # Whatever a native library prints must not mix with a command's standard output.
    os.dup2(2, 1)
    *place, descriptor = sys.argv[1:]
    sock = socket.socket(fileno=int(descriptor))
    if place:
        _serve_member(sock, Place.from_text(place[0]))
    else:
        serve_ipc(sock, _make_engine)
    sys.stderr.flush()
    # Compiler and device threads may still be at work; none may hold up the end of the process.
    os._exit(0)


def _make_engine(config: EngineConfig, deliver: Deliver, report: Report) -> Engine:
    from jaxserve.engine.client import EngineThread

    return EngineThread(config, deliver, report=report)


def _serve_member(sock: socket.socket, place: Place) -> None:
    """Serves the front of one process of a cluster, until either ends."""
    outbox = Outbox(sock)
    members: list[Member] = []

    def on_end(reason: str | None) -> None:
        outbox.put(Ended() if reason is None else Died("EngineStopped", reason))
        outbox.close()
        # A step whose collectives wait for a lost process cannot be joined.
        os._exit(0 if reason is None else 1)

    def make_engine(config: EngineConfig, deliver: Deliver, report: Report) -> Engine:
        members.append(Member(place, config, report, on_end, on_heard=lambda: outbox.put(Joined())))
        return members[0].start(deliver)

    def on_close(message: Close | None) -> None:
        if message is None:
            # Without its front this process is lost to the others: no word, and they end, too.
            os._exit(1)
        if message.reason is not None and members:
            members[0].end(message.reason)
            outbox.close()
            # A step that the others no longer take part in cannot be joined.
            os._exit(1)

    serve_ipc(sock, make_engine, outbox=outbox, on_close=on_close)
    if members:
        members[0].end()


if __name__ == "__main__":
    main()
