"""How the rest of jaxserve talks to an engine, and the engine on a thread of this process.

Importing this file imports no jax; making an `EngineThread` does.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jaxserve.config import EngineConfig
from jaxserve.engine.info import EngineInfo, EngineStats, Report
from jaxserve.engine.request import Request, Update
from jaxserve.errors import EngineStopped, JaxserveError, QueueFull, RequestError
from jaxserve.structured_outputs import Grammar, Vocabulary

if TYPE_CHECKING:
    from jaxserve.engine.core import EngineCore
    from jaxserve.engine.grammar import GrammarCompiler, Matcher
    from jaxserve.engine.leader import Leader

Deliver = Callable[[list[Update]], None]


class EngineClient(Protocol):
    """A running engine. Updates arrive through the `deliver` callback it was made with."""

    info: EngineInfo

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Tells what tokens are made of, which grammars need. Any thread may call it."""

    def prepare(self, grammar: Grammar) -> None:
        """Compiles a grammar, or finds it compiled, for requests that follow.

        Blocks for seconds at most. Raises RequestError with the compiler's reason. Any thread
        may call it.
        """

    def submit(self, request: Request) -> None:
        """Queues a request. Raises QueueFull or EngineStopped. Any thread may call it.

        One with a grammar that was not prepared is prepared first.
        """

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests; unknown ids are ignored. Any thread may call it."""

    def stats(self) -> EngineStats:
        """Returns the counters now."""

    def close(self) -> None:
        """Stops the engine and frees the device; calling it twice is fine."""


@dataclass(frozen=True)
class _Abort:
    request_ids: tuple[str, ...]


@dataclass(frozen=True)
class _Add:
    request: Request
    matcher: Matcher | None  # of its grammar


class _Close:
    """Asks the engine thread to end."""


class EngineThread:
    """Runs an engine on a thread of its own. Any thread may submit, abort and close.

    The thread alone touches the core; others leave messages in an inbox. If the core raises, every
    live request gets an update with the error, in one last delivery that may be empty, and later
    submits raise EngineStopped.
    """

    def __init__(
        self,
        config: EngineConfig,
        deliver: Deliver,
        *,
        report: Report | None = None,
        leader: Leader | None = None,  # of other processes, which run the model with this one
    ) -> None:
        """Loads and compiles; returns when ready. Raises what loading raises."""
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Close] = queue.SimpleQueue()
        self._compiler: GrammarCompiler | None = None
        self._vocab_size = 0  # of the masks
        # Guards what submitters and the engine thread both read and write.
        self._lock = threading.Lock()
        self._is_closed = False
        self._room = 0  # requests that may still come, until a step makes more
        self._max_waiting = 0
        self._live: set[str] = set()  # request ids, on the engine thread
        self._stats = EngineStats()
        self.error: BaseException | None = None  # what ended the thread, if not `close`
        started: queue.SimpleQueue[EngineInfo | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run,
            args=(config, report or _ignore, leader, started),
            name="engine",
            daemon=True,
        )
        self._thread.start()
        try:
            answer = started.get()
        except BaseException:  # Ctrl-C in a notebook: nobody will hold this engine
            self._inbox.put(_Close())
            raise
        if isinstance(answer, BaseException):
            self._thread.join()
            raise answer
        self.info = answer

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Tells what tokens are made of, which grammars need."""
        from jaxserve.engine.grammar import GrammarCompiler

        if self.info.eos_tokens:
            self._compiler = GrammarCompiler(
                vocabulary, vocab_size=self._vocab_size, eos_tokens=self.info.eos_tokens
            )

    def prepare(self, grammar: Grammar) -> None:
        """Compiles a grammar, or finds it compiled. Raises `RequestError`."""
        self._matcher_for(grammar)

    def submit(self, request: Request) -> None:
        """Queues a request; its updates, or one with an error, will be delivered."""
        grammar = request.params.grammar
        matcher = None if grammar is None else self._matcher_for(grammar)
        with self._lock:
            if self._is_closed:
                raise EngineStopped("the engine has stopped") from self.error
            if self._room <= 0:
                raise QueueFull(f"{self._max_waiting} requests wait already, which is the limit")
            self._room -= 1
            self._inbox.put(_Add(request, matcher))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests: an update says so, and their pages are free for the next step."""
        self._inbox.put(_Abort(tuple(request_ids)))

    def stats(self) -> EngineStats:
        """Returns the counters after the newest step."""
        return self._stats

    def close(self) -> None:
        """Ends the thread and frees the device; requests still live get an error."""
        with self._lock:
            self._is_closed = True
            self._inbox.put(_Close())
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._compiler is not None:
            self._compiler.close()

    def _matcher_for(self, grammar: Grammar) -> Matcher:
        with self._lock:
            if self._is_closed:
                raise EngineStopped("the engine has stopped") from self.error
        if self._compiler is None:
            raise RequestError(
                f"{grammar.param} cannot be honoured: the model has no token that ends an answer, "
                "or its vocabulary is not known",
                param=grammar.param,
            )
        return self._compiler.matcher_for(grammar)

    def _run(
        self,
        config: EngineConfig,
        report: Report,
        leader: Leader | None,
        started: queue.SimpleQueue[EngineInfo | BaseException],
    ) -> None:
        try:
            from jaxserve.engine.core import EngineCore
            from jaxserve.engine.pathways import initialize_pathways

            initialize_pathways()
            core = EngineCore(config, report, leader)
        except BaseException as error:  # handed to the caller, who raises it
            started.put(error)
            return
        self._max_waiting = core.max_waiting
        self._vocab_size = core.vocab_size
        self._count_room(core)
        self._stats = core.stats()
        started.put(core.info)
        try:
            self._loop(core)
        except BaseException as error:  # the one place: no request may wait for a dead engine
            self.error = error
        try:
            self._fail_all()
        finally:
            # Without a reason the other processes of a cluster would take it for an end in order.
            core.close(None if self.error is None else self._reason())

    def _loop(self, core: EngineCore) -> None:
        while True:
            # Blocks only while there is nothing to compute.
            for message in self._messages(wait=not core.has_work):
                if isinstance(message, _Close):
                    return
                self._handle(core, message)
            if core.has_work:
                self._send(core.step())
            self._stats = core.stats()
            self._count_room(core)

    def _count_room(self, core: EngineCore) -> None:
        """Renews how many requests may come: free slots, and what the queue still holds."""
        with self._lock:
            self._room = core.num_free - self._inbox.qsize()

    def _messages(self, *, wait: bool) -> list[_Add | _Abort | _Close]:
        messages = [self._inbox.get()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(self._inbox.get_nowait())
        return messages

    def _handle(self, core: EngineCore, message: _Add | _Abort | _Close) -> None:
        if isinstance(message, _Add):
            request_id = message.request.request_id
            self._live.add(request_id)
            try:
                core.add(message.request, message.matcher)
            except JaxserveError as error:
                self._send([Update(request_id=request_id, error=str(error))])
        elif isinstance(message, _Abort):
            core.abort(message.request_ids)
            aborted = [name for name in message.request_ids if name in self._live]
            self._send([Update(request_id=name, finish_reason="abort") for name in aborted])

    def _send(self, updates: list[Update]) -> None:
        if not updates:
            return
        for update in updates:
            if update.finish_reason is not None or update.error is not None:
                self._live.discard(update.request_id)
        self._deliver(updates)

    def _reason(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"

    def _fail_all(self) -> None:
        """Tells every request that still hopes, those in the inbox included."""
        with self._lock:
            self._is_closed = True  # from here on nothing enters the inbox
        for message in self._messages(wait=False):
            if isinstance(message, _Add):
                self._live.add(message.request.request_id)
        reason = "closed" if self.error is None else self._reason()
        text = f"the engine has stopped: {reason}"
        updates = [Update(request_id=request_id, error=text) for request_id in sorted(self._live)]
        if updates or self.error is not None:
            self._deliver(updates)


def _ignore(line: str) -> None:
    """Drops a progress line."""
