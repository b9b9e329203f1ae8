"""What completions and chat share: from a checked body to samples in flight, and their counts."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request as HttpRequest

from jaxserve.engine.ipc import UpdateStream
from jaxserve.engine.request import ALL_LOGPROBS, FinishReason, Request
from jaxserve.errors import EngineStopped, PromptTooLong, RequestError
from jaxserve.generation import Assembler, Delta, PositionLogprobs, TokenText
from jaxserve.server.metrics import SampleClock
from jaxserve.server.protocol.common import (
    CompletionTokensDetails,
    GenerationFields,
    PromptTokensDetails,
    Usage,
    check_request_id,
)
from jaxserve.server.request_log import record_of
from jaxserve.server.state import ServerState
from jaxserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxserve.server.beams import BeamUpdates

T = TypeVar("T")

# Longer texts are encoded on a thread, so that streams are not held up.
MAX_INLINE_CHARS = 2000
# Texts of more characters than this for each position of the context are looked at in pieces.
PROBE_CHARS = 4
PROBE_PIECE_CHARS = 4096
PROBE_SLACK_TOKENS = 16
MIN_LOGPROB = -9999.0  # JSON has no infinity


class Sample:
    """One choice of the reply, in flight."""

    def __init__(self, index: int, request: Request, prompt: int, state: ServerState) -> None:
        _, _, text = state.loaded()
        self.index = index
        self.prompt = prompt  # which of the client's prompts
        self.prompt_tokens = request.prompt_tokens
        self.is_started = False  # for streams: something has been sent
        self.assembler = Assembler(request, text.tokenizer)
        self.clock = SampleClock(state.metrics, request.arrival_s)


class Generation:
    """All samples of one HTTP request. Closing `updates` aborts those that have not finished."""

    def __init__(
        self,
        state: ServerState,
        updates: UpdateStream | BeamUpdates,
        prompts: Sequence[Sequence[Request]],  # each prompt's samples
        *,
        is_echo_only: bool = False,  # the client asked for no token; the engine makes one
        num_reasoning: Callable[[], int] | None = None,  # tokens; None: nobody can tell
    ) -> None:
        self.updates = updates
        self._num_reasoning = num_reasoning
        self._is_echo_only = is_echo_only
        self._metrics = state.metrics
        self.samples: dict[str, Sample] = {}
        self._num_cached = [0] * len(prompts)
        self._num_open = [len(requests) for requests in prompts]  # samples not yet finished
        self._longest = [0] * len(prompts)
        self._num_prompt_tokens = 0
        self._num_tokens = 0
        self.finish_reasons: set[FinishReason] = set()
        self._has_details = state.config.enable_prompt_tokens_details
        for number, requests in enumerate(prompts):
            self._num_prompt_tokens += len(requests[0].prompt_tokens)
            state.metrics.observe_samples(requests)
            for request in requests:
                sample = Sample(len(self.samples), request, number, state)
                self.samples[request.request_id] = sample

    @property
    def usage(self) -> Usage:
        """What has been computed so far; each prompt counts once, however many its samples."""
        cached = PromptTokensDetails(cached_tokens=self.num_cached_tokens)
        reasoning = None
        if self._num_reasoning is not None:
            reasoning = CompletionTokensDetails(reasoning_tokens=self._num_reasoning())
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_tokens,
            total_tokens=self._num_prompt_tokens + self._num_tokens,
            prompt_tokens_details=cached if self._has_details else None,
            completion_tokens_details=reasoning,
        )

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were not computed again."""
        return sum(self._num_cached)

    def _note_end(self, sample: Sample) -> None:
        self._num_open[sample.prompt] -= 1
        self._longest[sample.prompt] = max(self._longest[sample.prompt], sample.clock.num_tokens)
        if not self._num_open[sample.prompt]:
            self._metrics.max_generation_tokens.observe(self._longest[sample.prompt])

    async def deltas(self) -> AsyncGenerator[list[tuple[Sample, Delta]]]:
        """Yields what has come since the last time. Raises `EngineStopped` if the engine dies."""
        updates = self.updates
        while not updates.is_finished:
            news = []
            for update in await updates.take():
                sample = self.samples[update.request_id]
                try:
                    delta = sample.assembler.push(update)
                except EngineStopped:
                    self._metrics.num_failed += 1
                    raise
                if delta.must_abort:
                    updates.drop(update.request_id)
                if self._is_echo_only:
                    delta = _without_answer(delta)
                if delta.finish_reason is not None:
                    self._metrics.num_finished[delta.finish_reason] += 1
                    self.finish_reasons.add(delta.finish_reason)
                self._num_tokens += len(delta.tokens)
                cached = self._num_cached
                cached[sample.prompt] = max(cached[sample.prompt], delta.num_cached_tokens)
                is_last = delta.finish_reason is not None
                sample.clock.tick(len(delta.tokens), update.timeline, is_last=is_last)
                if is_last:
                    self._note_end(sample)
                news.append((sample, delta))
            yield news


def _without_answer(delta: Delta) -> Delta:
    """Returns what a delta says about the prompt, as if nothing had been generated."""
    return delta._replace(
        text="",
        tokens=(),
        logprobs=() if delta.logprobs is not None else None,
        finish_reason=None if delta.finish_reason is None else "length",
        stop_reason=None,
    )


async def start(
    state: ServerState,
    prompts: Sequence[Sequence[Request]],
    *,
    is_echo_only: bool = False,
    num_reasoning: Callable[[], int] | None = None,
) -> Generation:
    """Returns the generation of all requests once the engine has admitted them."""
    engine, _, _ = state.loaded()
    updates = await engine.submit([request for requests in prompts for request in requests])
    return Generation(
        state, updates, prompts, is_echo_only=is_echo_only, num_reasoning=num_reasoning
    )


class Outcome:
    """A sample's deltas put together, for replies that do not stream."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.tokens: list[int] = []
        self.offsets: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.prompt_logprobs: Sequence[PositionLogprobs | None] | None = None
        self.last = Delta()
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self._texts)

    def add(self, delta: Delta) -> None:
        """Appends what a delta brought."""
        self._texts.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.offsets.extend(delta.offsets)
        self.logprobs.extend(delta.logprobs or ())
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.last = delta


async def collect(generation: Generation) -> list[Outcome]:
    """Returns every sample's outcome, in order; aborts them all when it is cancelled."""
    outcomes = {id(sample): Outcome(sample) for sample in generation.samples.values()}
    async with generation.updates, contextlib.aclosing(generation.deltas()) as deltas:
        async for news in deltas:
            for sample, delta in news:
                outcomes[id(sample)].add(delta)
    return _share_prompt_logprobs(list(outcomes.values()))


def _share_prompt_logprobs(outcomes: list[Outcome]) -> list[Outcome]:
    """Gives every sample of a prompt what the engine told its first sample alone."""
    known = {outcome.sample.prompt: outcome for outcome in reversed(outcomes)}
    for outcome in outcomes:
        outcome.prompt_logprobs = known[outcome.sample.prompt].prompt_logprobs
    return outcomes


def arrival(http: HttpRequest, body: GenerationFields, prefix: str) -> tuple[str, float]:
    """Returns the reply's id and the time. The header's id goes before the body's, then chance."""
    now_s = time.monotonic()
    record = record_of(http.scope)
    if header := http.headers.get("x-request-id"):
        record.request_id = check_request_id(header, "x-request-id")
    elif body.request_id:
        record.request_id = check_request_id(body.request_id, "request_id")
    return prefix + record.request_id, now_s


def priority_of(http: HttpRequest, body: GenerationFields) -> int:
    """Returns the request's priority: the header's goes before the body's."""
    header = http.headers.get("x-vllm-priority")
    if header is None:
        return body.priority or 0
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", header) or not -(2**63) <= int(header) < 2**63:
        raise RequestError(
            f"x-vllm-priority is {header[:40]!r}; it must be an integer of 64 bits",
            param="x-vllm-priority",
        )
    return int(header)


def engine_id(reply_id: str) -> str:
    """Returns an id that no other request in flight has, even if clients repeat theirs."""
    return f"{reply_id}-{secrets.token_hex(4)}"


async def off_loop(work: Callable[[], T], num_chars: int, *, is_slow: bool = False) -> T:
    """Returns the result of encoding `num_chars` characters, on a thread if they are many."""
    is_slow = is_slow or num_chars > MAX_INLINE_CHARS
    return await asyncio.to_thread(work) if is_slow else work()


def check_length(text: str, tokenizer: Tokenizer, limit: int, param: str) -> None:
    """Raises `PromptTooLong` early: a long text is encoded in pieces, until they are too many."""
    if len(text) <= PROBE_CHARS * limit:
        return
    count = 0
    num_chars = min(PROBE_CHARS * limit, PROBE_PIECE_CHARS)
    for start in range(0, len(text), num_chars):
        piece = text[start : start + num_chars]
        # A cut may make a few tokens more than the whole text has there.
        count += len(tokenizer.encode(piece, add_special_tokens=False)) - PROBE_SLACK_TOKENS
        if count >= limit:
            raise PromptTooLong(count, limit, param=param, at_least=True)


@contextlib.contextmanager
def params_named(names: dict[str, str]) -> Iterator[None]:
    """Lets a `RequestError` name the field as this endpoint spells it, or the field it is in."""
    try:
        yield
    except RequestError as error:
        param = error.param or ""
        error.param = names.get(param) or names.get(re.split(r"[.\[]", param)[0], error.param)
        raise


def token_name(token: TokenText, as_ids: bool) -> str:
    """Returns how replies write a token."""
    return f"token_id:{token.token}" if as_ids else token.text


def finite(logprob: float) -> float:
    """Returns the log-probability as JSON can write it."""
    return max(logprob, MIN_LOGPROB)


def shown(top: Sequence[TokenText], body: GenerationFields, count: int) -> Sequence[TokenText]:
    """Returns what a reply shows beside the chosen token: those listed by id, or the likeliest."""
    return top if body.logprob_token_ids or count == ALL_LOGPROBS else top[:count]


def prompt_logprobs_body(
    positions: Sequence[PositionLogprobs | None] | None, count: int | None
) -> list[dict[int, dict[str, Any]] | None] | None:
    """Returns vLLM's form: for each position {token: {logprob, rank, decoded_token}}."""
    if positions is None or count is None:
        return None
    limit = None if count == ALL_LOGPROBS else count
    return [_position_body(position, limit) for position in positions]


def _position_body(
    position: PositionLogprobs | None, count: int | None
) -> dict[int, dict[str, Any]] | None:
    if position is None:
        return None
    return {
        entry.token: {
            "logprob": finite(entry.logprob),
            "rank": entry.rank,
            "decoded_token": entry.text,
        }
        for entry in (position.chosen, *position.top[:count])
    }
