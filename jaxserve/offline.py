"""Runs a list of prompts to their end on an engine, from a thread that waits.

Host only: imports no jax.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.engine.request import Request, Update
from jaxserve.errors import EngineStopped, QueueFull
from jaxserve.generation import Assembler, Delta, PositionLogprobs, TokenText
from jaxserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxserve.engine.client import EngineClient

_ABORT_WAIT_S = 5.0
_RETRY_S = 0.01
_UpdateQueue = queue.SimpleQueue[list[Update]]


class Mailbox:
    """Hands each update to the call that waits for it. Any thread may use it.

    Apart from `LLM`, so that the engine's thread does not keep an `LLM` alive.
    """

    def __init__(self) -> None:
        self._queues: dict[str, _UpdateQueue] = {}

    def expect(self, request_id: str, updates: _UpdateQueue) -> None:
        """Sends the updates of `request_id` to `updates` from now on."""
        self._queues[request_id] = updates

    def forget(self, request_id: str) -> None:
        """Drops further updates of `request_id`."""
        self._queues.pop(request_id, None)

    def deliver(self, updates: list[Update]) -> None:
        """Hands out the updates of one step; never blocks."""
        shares: dict[int, tuple[_UpdateQueue, list[Update]]] = {}
        for update in updates:
            target = self._queues.get(update.request_id)
            if target is not None:
                shares.setdefault(id(target), (target, []))[1].append(update)
        for target, share in shares.values():
            target.put(share)


class Sample:
    """One request and what it has produced so far. One thread owns it."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.num_cached_tokens = 0
        self.first_token_s: float | None = None
        self._assembler = Assembler(request, tokenizer)
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._sum = 0.0
        self._end = Delta()

    def push(self, update: Update) -> Delta:
        """Takes in one update; raises `EngineStopped` if it says so."""
        delta = self._assembler.push(update)
        if delta.tokens and self.first_token_s is None:
            self.first_token_s = time.monotonic()
        self._tokens += delta.tokens
        self._texts.append(delta.text)
        for position in delta.logprobs or ():
            self._logprobs.append(_as_dict(position))
            self._sum += position.chosen.logprob
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = [
                None if position is None else _as_dict(position)
                for position in delta.prompt_logprobs
            ]
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self._end = delta
        return delta

    def output(self, index: int) -> CompletionOutput:
        """Returns everything so far, as sample `index` of its prompt."""
        has_logprobs = self.request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(self._texts),
            token_ids=list(self._tokens),
            cumulative_logprob=self._sum if has_logprobs else None,
            logprobs=self._logprobs if has_logprobs else None,
            finish_reason=self._end.finish_reason,
            stop_reason=self._end.stop_reason,
        )


def _as_dict(position: PositionLogprobs) -> dict[int, Logprob]:
    """Returns vLLM's form: the chosen token first, then the most likely ones."""
    return {token.token: _as_logprob(token) for token in (position.chosen, *position.top)}


def _as_logprob(token: TokenText) -> Logprob:
    return Logprob(logprob=token.logprob, rank=token.rank, decoded_token=token.text)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prompt and its samples."""

    request_id: str
    prompt: str | None
    samples: list[Sample]

    def output(self) -> RequestOutput:
        """Returns the result of the prompt, once no sample runs any more."""
        first = self.samples[0]
        started = [sample.first_token_s for sample in self.samples if sample.first_token_s]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(first.request.prompt_tokens),
            prompt_logprobs=first.prompt_logprobs,
            outputs=[sample.output(index) for index, sample in enumerate(self.samples)],
            finished=True,
            num_cached_tokens=first.num_cached_tokens,
            metrics=RequestMetrics(
                arrival_time=first.request.arrival_s,
                first_token_time=min(started, default=None),
                finished_time=time.monotonic(),
            ),
        )


def run(
    client: EngineClient,
    mailbox: Mailbox,
    answers: Sequence[Answer],
    *,
    is_by_priority: bool = False,
    on_output: Callable[[RequestOutput], None] | None = None,
) -> list[RequestOutput]:
    """Returns the outputs in the order of `answers`, when all have finished.

    At most a few times as many requests as the engine has slots are with it at once, so that any
    number of prompts fits its queue. If anything is raised, Ctrl-C included, what is outstanding
    is aborted first, and gone from the engine.
    """
    owners = {sample.request.request_id: answer for answer in answers for sample in answer.samples}
    samples = [sample for answer in answers for sample in answer.samples]
    if is_by_priority:
        samples.sort(key=lambda sample: sample.request.priority)
    num_running = {answer.request_id: len(answer.samples) for answer in answers}
    feeder = _Feeder(client, mailbox, samples)
    outputs: dict[str, RequestOutput] = {}
    try:
        while feeder.is_busy:
            for sample in feeder.step():
                answer = owners[sample.request.request_id]
                num_running[answer.request_id] -= 1
                if num_running[answer.request_id] == 0:
                    outputs[answer.request_id] = answer.output()
                    if on_output is not None:
                        on_output(outputs[answer.request_id])
    finally:
        feeder.close()
    return [outputs[answer.request_id] for answer in answers]


class _Feeder:
    """Keeps the engine supplied. waiting + live + finished = all samples. One thread owns it."""

    def __init__(self, client: EngineClient, mailbox: Mailbox, samples: Iterable[Sample]) -> None:
        self._client = client
        self._mailbox = mailbox
        self._waiting = deque(samples)
        self._live: dict[str, Sample] = {}
        self._max_live = 4 * client.info.max_num_seqs
        self._updates: _UpdateQueue = queue.SimpleQueue()

    @property
    def is_busy(self) -> bool:
        """True until every sample has finished."""
        return bool(self._waiting or self._live)

    def step(self) -> list[Sample]:
        """Submits what fits, waits for updates, and returns the samples they finished."""
        self._submit()
        if not self._live:
            time.sleep(_RETRY_S)  # another call has filled the engine's queue
            return []
        finished, stopped = [], []
        for update in self._updates.get():
            sample = self._live.get(update.request_id)
            if sample is None:
                continue
            delta = self._push(sample, update)
            if delta.finish_reason is None:
                continue
            self._drop(update.request_id)
            finished.append(sample)
            if delta.must_abort:
                stopped.append(update.request_id)
        if stopped:
            self._client.abort(stopped)
        return finished

    def close(self) -> None:
        """Aborts what is still live and waits until the engine has let go of it."""
        self._waiting.clear()
        if not self._live:
            return
        self._client.abort(list(self._live))
        deadline = time.monotonic() + _ABORT_WAIT_S
        while self._live and not self._is_engine_idle() and time.monotonic() < deadline:
            try:
                updates = self._updates.get(timeout=_RETRY_S)
            except queue.Empty:
                continue
            for update in updates:
                if update.finish_reason is not None or update.error is not None:
                    self._drop(update.request_id)
        for request_id in list(self._live):
            self._drop(request_id)

    def _is_engine_idle(self) -> bool:
        try:
            stats = self._client.stats()
        except EngineStopped:
            return True
        return stats.num_running + stats.num_waiting == 0

    def _submit(self) -> None:
        while self._waiting and len(self._live) < self._max_live:
            sample = self._waiting[0]
            request_id = sample.request.request_id
            # Before the submission: its first update may come at once, and so may Ctrl-C.
            self._live[request_id] = sample
            self._mailbox.expect(request_id, self._updates)
            try:
                self._client.submit(sample.request)
            except QueueFull:
                self._drop(request_id)
                return
            except EngineStopped:
                self._drop(request_id)
                raise
            self._waiting.popleft()

    def _push(self, sample: Sample, update: Update) -> Delta:
        try:
            return sample.push(update)
        except EngineStopped as error:
            self._drop(update.request_id)
            cause = getattr(self._client, "error", None)
            raise error from (cause if isinstance(cause, BaseException) else None)

    def _drop(self, request_id: str) -> None:
        self._live.pop(request_id, None)
        self._mailbox.forget(request_id)
