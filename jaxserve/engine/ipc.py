"""The engine in a process of its own: msgpack frames over a socket pair, never pickle.

The front (HTTP and text) is the parent. It starts the engine with one end of an anonymous socket
pair, so nothing else on the machine can connect, and either side sees the other's death as an end
of file.

Host only: imports no jax, except in the engine process's `main`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.engine.frames import LENGTH
from jaxserve.engine.info import EngineInfo, EngineStats, Report
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
    SetVocabulary,
    Start,
    Stats,
    Submit,
    ToEngine,
    ToFront,
    Updates,
    front_decoder,
    pack_frame,
    pack_request,
)
from jaxserve.errors import ConfigError, EngineStopped, JaxserveError, QueueFull, RequestError
from jaxserve.structured_outputs import Grammar, Vocabulary

EXIT_GRACE_S = 10.0
ALIVE_S = 5.0  # in which an engine process of a cluster must say something
ENGINE_COMMAND = (sys.executable, "-m", "jaxserve.engine.process")

logger = logging.getLogger("jaxserve")


class UpdateStream:
    """The updates of one client's requests, coalesced: one wake-up however many have queued.

    Belongs to the event loop's thread. Leaving the `async with` aborts what has not finished.
    """

    def __init__(self, client: IpcClient, request_ids: Sequence[str]) -> None:
        self._client = client
        self._live = set(request_ids)
        self._queued: list[Update] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_finished(self) -> bool:
        """True when every request has had its last update and all were taken."""
        return not self._live and not self._queued

    def push(self, update: Update) -> None:
        """Queues an update and wakes the reader."""
        self._queued.append(update)
        if update.finish_reason is not None or update.error is not None:
            self._live.discard(update.request_id)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Update]:
        """Waits for news; returns all that has queued, at most one update for each request."""
        if not self._queued:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        updates, self._queued = self._queued, []
        return updates if len(updates) == 1 else _merge(updates)

    def drop(self, request_id: str) -> None:
        """Aborts one request; nothing more is awaited from it."""
        self._live.discard(request_id)
        self._client.abort((request_id,))

    async def __aenter__(self) -> UpdateStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._live:
            self._client.num_abandoned += len(self._live)
            self._client.abort(tuple(self._live))
            self._live.clear()


def _merge(updates: list[Update]) -> list[Update]:
    """Returns one update for each request, its tokens in order."""
    merged: dict[str, Update] = {}
    for update in updates:
        before = merged.get(update.request_id)
        if before is not None:
            prompt_logprobs = update.prompt_logprobs
            update = dataclasses.replace(
                update,
                tokens=before.tokens + update.tokens,
                logprobs=before.logprobs + update.logprobs,
                prompt_logprobs=prompt_logprobs or before.prompt_logprobs,
                num_cached_tokens=max(before.num_cached_tokens, update.num_cached_tokens),
                timeline=update.timeline or before.timeline,
            )
        merged[update.request_id] = update
    return list(merged.values())


class IpcClient:
    """The front's side. Belongs to the event loop's thread.

    `info` is None while the engine loads; `error` says why it died.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        process: subprocess.Popen[bytes] | None,
        report: Report,
    ) -> None:
        self.info: EngineInfo | None = None
        self.error: str | None = None
        self.error_kind = "EngineStopped"
        self.has_joined = False  # a cluster, whose process 0 decides when it ends
        self.has_ended = False  # in order, by itself
        self.num_abandoned = 0  # requests whose client left before their end
        self.stopped = asyncio.Event()
        self._ready = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._process = process
        self._report = report
        self._calls = itertools.count()
        self._answers: dict[int, asyncio.Future[Admitted | Stats]] = {}
        self._streams: dict[str, UpdateStream] = {}
        self._pump = asyncio.create_task(self._read_frames())
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        report: Report,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> IpcClient:
        """Starts the engine process and returns at once; `wait_ready` waits for it to load."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
            )
        return await cls.connect(ours, config, report=report, process=process)

    @classmethod
    async def connect(
        cls,
        sock: socket.socket,
        config: EngineConfig,
        *,
        report: Report,
        process: subprocess.Popen[bytes] | None = None,
    ) -> IpcClient:
        """Greets the engine at the other end of `sock`."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**20)
        client = cls(reader, writer, process, report)
        client._send(Start(dataclasses.asdict(config)))
        return client

    async def wait_ready(self) -> EngineInfo:
        """Waits until the engine takes requests. Raises `EngineStopped` if it never will."""
        await self._ready.wait()
        if self.info is None or self.error is not None:
            raise self._stopped_error()
        return self.info

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Tells the engine what tokens are made of, which grammars need."""
        self._send(SetVocabulary(vocabulary))

    async def submit(self, requests: Sequence[Request]) -> UpdateStream:
        """Admits all of the requests or none: raises the engine's `RequestError` for the latter."""
        if self.error is not None:
            raise self._stopped_error()
        self._check_count(len(requests))
        for grammar in dict.fromkeys(request.params.grammar for request in requests):
            if grammar is not None:
                await self._prepare(grammar)
        request_ids = [request.request_id for request in requests]
        stream = UpdateStream(self, request_ids)
        # Updates may overtake the answer, so the stream is known before the request leaves.
        self._streams.update(dict.fromkeys(request_ids, stream))
        try:
            answer = await self._call(
                lambda call: Submit(call, [pack_request(request) for request in requests])
            )
        except BaseException:
            self.abort(request_ids)
            raise
        assert isinstance(answer, Admitted)
        if answer.kind is not None:
            self._forget(request_ids)
            raise _refusal(answer)
        return stream

    def _check_count(self, count: int) -> None:
        """Refuses for good what no waiting could make room for."""
        info = self.info
        if info is not None and count > (limit := info.max_num_seqs + info.max_waiting):
            raise RequestError(
                f"{count} sequences are asked for at once; the limit is {limit}: "
                f"max_num_seqs {info.max_num_seqs} and max_num_queued_reqs {info.max_waiting}",
                param="n",
            )

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests whose client has left; unknown and finished ones are ignored."""
        live = [request_id for request_id in request_ids if request_id in self._streams]
        self._forget(live)
        if live:
            self._send(Abort(live))

    async def stats(self) -> EngineStats:
        """Returns the engine's counters. Raises `EngineStopped` when there is no engine."""
        answer = await self._call(AskStats)
        assert isinstance(answer, Stats)
        return answer.stats

    async def close(self, reason: str | None = None) -> None:
        """Ends the engine process, by force if it does not end in time.

        A reason is what failed: the other processes of its cluster end with that error.
        """
        self._send(Close(reason))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._pump), EXIT_GRACE_S)
        self._pump.cancel()
        if self._watching is not None:
            self._watching.cancel()
        self._writer.close()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, EXIT_GRACE_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def fail(self, reason: str) -> None:
        """Ends every request with an error and takes no more."""
        self._stop("EngineStopped", reason)

    def kill(self) -> None:
        """Ends the engine process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    async def _prepare(self, grammar: Grammar) -> None:
        """Waits until the engine has compiled a grammar. Raises its `RequestError`."""
        answer = await self._call(lambda call: Prepare(call, grammar))
        assert isinstance(answer, Admitted)
        if answer.kind is not None:
            raise _refusal(answer)

    async def _call(self, message_for: Callable[[int], ToEngine]) -> Admitted | Stats:
        if self.error is not None:  # it may have come while the caller waited for something else
            raise self._stopped_error()
        call = next(self._calls)
        answer: asyncio.Future[Admitted | Stats] = asyncio.get_running_loop().create_future()
        self._answers[call] = answer
        try:
            self._send(message_for(call))
            return await answer
        finally:
            self._answers.pop(call, None)

    def _send(self, message: ToEngine) -> None:
        if not self._writer.is_closing():
            self._writer.write(pack_frame(message))

    def _forget(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._streams.pop(request_id, None)

    async def _read_frames(self) -> None:
        try:
            while True:
                (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                self._receive(front_decoder.decode(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._stop("EngineStopped", "the engine process ended")
        except msgspec.MsgspecError as error:
            self._stop("EngineStopped", f"the engine sent a frame that cannot be read: {error}")
        except Exception as error:
            # Nobody awaits this task before the end: without the stop every stream would hang.
            logger.exception("reading from the engine failed")
            self._stop("EngineStopped", f"reading from the engine failed: {error}")

    def _receive(self, message: ToFront) -> None:
        match message:
            case Updates(updates):
                for update in updates:
                    self._deliver(update)
            case Admitted() | Stats():
                answer = self._answers.get(message.call)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Progress(line):
                self._report(line)
            case Joined():
                self.has_joined = True
            case Ready(info):
                self._be_ready(info)
            case Died(kind, text):
                self._stop(kind, text)
            case Ended():
                self.has_ended = True
                self._stop("EngineStopped", "the cluster has ended")

    def _be_ready(self, info: EngineInfo) -> None:
        self.info = info
        self._ready.set()
        if info.num_processes > 1:
            self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Ends an engine process that stands still: the others of its cluster end without it."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(JaxserveError):
            while True:
                await asyncio.sleep(ALIVE_S / 5)
                asked_s = loop.time()
                try:
                    await asyncio.wait_for(self.stats(), ALIVE_S)
                except TimeoutError:
                    if loop.time() - asked_s > ALIVE_S + 1:
                        continue  # the loop itself stood still: the answer may lie unread
                    self._stop(
                        "EngineStopped", f"the engine process has not answered for {ALIVE_S:.0f} s"
                    )
                    if self._process is not None:
                        self._process.kill()
                    return

    def _deliver(self, update: Update) -> None:
        stream = self._streams.get(update.request_id)
        if stream is None:
            return  # aborted while its update was under way
        if update.finish_reason is not None or update.error is not None:
            del self._streams[update.request_id]
        stream.push(update)

    def _stop(self, kind: str, text: str) -> None:
        """Fails all that waits for the engine; the first reason given is the one kept."""
        if self.error is None:
            self.error_kind, self.error = kind, text
        for request_id, stream in list(self._streams.items()):
            stream.push(Update(request_id=request_id, error=self.error))
        self._streams.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._stopped_error())
        self._ready.set()
        self.stopped.set()

    def _stopped_error(self) -> JaxserveError:
        if self.error_kind == "ConfigError":
            return ConfigError(self.error)
        return EngineStopped(self.error)


def _refusal(answer: Admitted) -> JaxserveError:
    """Returns the error that the engine raised, rebuilt from its name."""
    if answer.kind == "QueueFull":
        return QueueFull(answer.message, param=answer.param)
    if answer.kind == "EngineStopped":
        return EngineStopped(answer.message)
    return RequestError(answer.message, param=answer.param)
