"""Decides what each step computes and for whom, and commits what it brought.

One rule covers prefill, chunked prefill, prefix hits and decode: a sequence has tokens to compute,
a step has a token budget. Decodes come first, then prefills in order, then admissions.

`plan_step` reserves slots and pages as it decides, since whether pages can be had (and who is
preempted for them) is itself the decision; what each span may compute is a pure function of the
sequence and of what is left (`span_for`). Progress is recorded in one place, once the plan is
complete (`_advance`): from then on the plan must be dispatched, before the next one.

Host only: imports no jax.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from jaxserve.engine.draft import Draft, span_for
from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix_cache import PrefixCache
from jaxserve.engine.request import FinishReason, Request, TokenLogprobs, Update
from jaxserve.engine.sequence import Sequence, Span, SpanResult, StepPlan, end_of, sequence_for
from jaxserve.errors import PromptTooLong, QueueFull, RequestError

_key_of = attrgetter("key")


@dataclass(slots=True)
class SchedulerTotals:
    """Monotonic counters, for /metrics."""

    prompt_tokens: int = 0  # of prompts whose first output token is committed
    generation_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache, at first admission
    prefix_hits: int = 0  # those found
    num_preemptions: int = 0
    num_finished: dict[FinishReason, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "abort": 0}
    )


class Scheduler:
    """Owns the sequences in flight, their order, their slots and, through the pool, their pages.

    Made for one step in flight while the next is planned:

        plan = plan_step(); dispatch(plan); commit(previous, results of previous)

    A token in flight counts: its successor is planned before the host knows it, and an end that
    only shows in the token (EOS) is seen one step late. Steps run in order on the device, so pages
    and slots may be given away while a step that uses them is still in flight.
    Owned by the engine thread.
    """

    def __init__(
        self,
        pool: PagePool,
        prefix_cache: PrefixCache,
        *,
        num_slots: int,
        max_step_tokens: int,
        max_model_len: int,  # prompt and outputs together
        page_size: int,
        max_waiting: int,
        eos_tokens: Iterable[int],
        max_page_grants: int,  # pages one step can write into the page table
        max_history_tokens: int,  # tokens of the admitted one step can upload, for penalties
        max_wide_admissions: int,  # admissions one step can take that upload lists of tokens
        max_step_rows: int | None = None,  # rows of logits in one step; None: num_slots
        policy: Literal["fcfs", "priority"] = "fcfs",
    ) -> None:
        pages_per_sequence = -(-max_model_len // page_size)
        max_step_rows = num_slots if max_step_rows is None else max_step_rows
        assert min(num_slots, max_step_tokens, max_step_rows, max_waiting) > 0
        assert page_size == prefix_cache.page_size, f"{page_size=} {prefix_cache.page_size=}"
        # Alone, the longest sequence must fit, or it would wait for ever.
        assert pages_per_sequence <= pool.num_pages, f"{pages_per_sequence=} {pool.num_pages=}"
        assert pages_per_sequence <= max_page_grants, f"{pages_per_sequence=} {max_page_grants=}"
        assert max_model_len <= max_history_tokens, f"{max_model_len=} {max_history_tokens=}"
        assert max_wide_admissions > 0
        self.running: list[Sequence] = []  # by key; others only read it
        self.waiting: list[Sequence] = []  # by key; others only read it
        self.totals = SchedulerTotals()
        self._pool = pool
        self._prefix_cache = prefix_cache
        self._num_slots = num_slots
        self._max_model_len = max_model_len
        self._page_size = page_size
        self._max_waiting = max_waiting
        self._eos_tokens = frozenset(eos_tokens)
        self._has_priorities = policy == "priority"
        self._limits = {
            "tokens": max_step_tokens,
            "rows": max_step_rows,
            "grants": max_page_grants,
            "history": max_history_tokens,
            "wide": max_wide_admissions,
        }
        # Room for the running to grow into, so that an admission is not preempted at once.
        self._num_reserve_pages = max(1, pool.num_pages // 100)
        self._free_slots = list(range(num_slots))  # a heap: low slots first
        self._sequences: dict[str, Sequence] = {}
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """True while any sequence is running or waiting."""
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        """The number of sequences that hold a slot."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """The number of sequences that wait for a slot, preempted ones included."""
        return len(self.waiting)

    def add(self, request: Request) -> None:
        """Puts a request in the queue.

        Raises `QueueFull`, `PromptTooLong`, or `RequestError` for an empty prompt or a used id.
        """
        num_prompt = len(request.prompt_tokens)
        if not num_prompt:
            raise RequestError("the prompt has 0 tokens; it needs at least 1", param="prompt")
        if num_prompt >= self._max_model_len:
            raise PromptTooLong(num_prompt, self._max_model_len)
        if request.request_id in self._sequences:
            raise RequestError(
                f"request_id {request.request_id!r} is in flight already", param="request_id"
            )
        if (count := len(self.waiting)) >= self._max_waiting:
            raise QueueFull(f"{count} requests wait already; the limit is {self._max_waiting}")
        self._num_added += 1
        sequence = sequence_for(
            request,
            key=(request.priority if self._has_priorities else 0, self._num_added),
            eos_tokens=self._eos_tokens,
            max_model_len=self._max_model_len,
        )
        self._sequences[request.request_id] = sequence
        insort(self.waiting, sequence, key=_key_of)

    def abort(self, request_id: str) -> None:
        """Ends a request and frees what it holds; what is in flight for it will be dropped."""
        if (sequence := self._sequences.get(request_id)) is not None:
            self._finish(sequence, "abort")

    def plan_step(self) -> StepPlan | None:
        """Returns what the next step computes, or None if nothing can be computed now.

        With None, commit the step in flight, if there is one, and ask again.
        """
        draft = Draft(**self._limits)
        prefills = self._plan_decodes(draft)
        for sequence in prefills:
            if draft.tokens_left == 0:
                break
            if sequence.slot is not None:
                self._plan_prefill(draft, sequence)
        # Those just preempted come first, and pages are short: nobody new in the same step.
        if not draft.preempted:
            while self.waiting and self._free_slots and draft.tokens_left:
                if not self._admit(draft, self.waiting[0]):
                    break
        plan = draft.plan()
        if plan is not None:
            self._advance(plan)
        return plan

    def commit(self, plan: StepPlan, results: Iterable[SpanResult]) -> list[Update]:
        """Appends the tokens of a step, `results` aligned with `plan.spans`, and ends sequences.

        Plans are committed in the order in which they were made.
        """
        updates = []
        for span, result in zip(plan.spans, results, strict=True):
            sequence = span.sequence
            if sequence.is_finished:
                continue
            if result.prompt_logprobs:
                sequence.prompt_logprobs += result.prompt_logprobs
            if span.samples:
                assert result.token is not None, f"{span.start=} {span.count=} has no token"
                # What the model computed for is the end of what the host knows.
                assert span.start + span.count == len(sequence.tokens), f"{span.start=}"
                updates.append(self._commit_token(sequence, result.token, result.logprobs))
        return updates

    def check_idle(self) -> None:
        """Asserts that without work nothing is held: all pages and all slots are free."""
        assert not self._sequences and not self.running and not self.waiting
        assert len(self._free_slots) == self._num_slots, f"{self._free_slots=}"
        self._pool.check()
        self._prefix_cache.check()
        assert self._pool.num_free == self._pool.num_pages, f"{self._pool.num_free=}"

    def _plan_decodes(self, draft: Draft) -> list[Sequence]:
        """Gives each running sequence with one token to compute its span; returns the others."""
        prefills = []
        page_size = self._page_size
        index = 0
        # Preemption shortens the list from its end, so an iterator would not do.
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            num_known = len(sequence.tokens)
            num_total = num_known + sequence.num_in_flight
            if num_total >= sequence.max_total:
                continue  # its last token is in flight
            start = sequence.num_computed
            if num_total - start > 1:
                prefills.append(sequence)
                continue
            if not draft.tokens_left or not draft.rows_left:
                continue
            if start == len(sequence.pages) * page_size and not self._grow(draft, sequence):
                continue
            draft.add(Span(sequence, start, 1, True, start >= num_known, 1))
        return prefills

    def _plan_prefill(self, draft: Draft, sequence: Sequence) -> None:
        """Gives a running sequence as much as the limits and the free pages allow."""
        start = sequence.num_computed
        if span_for(sequence, start, draft, self._max_model_len) is None:
            return
        # One page is worth a preemption, if there is not even a part of one; more are only taken
        # where they are free.
        if start == len(sequence.pages) * self._page_size and not self._grow(draft, sequence):
            return
        num_pages = len(sequence.pages) + min(self._pool.num_free, draft.grants_left)
        span = span_for(sequence, start, draft, num_pages * self._page_size)
        assert span is not None, f"{start=} {num_pages=}"
        draft.grant(sequence, self._take(self._num_pages_for(span) - len(sequence.pages)))
        draft.add(span)

    def _admit(self, draft: Draft, sequence: Sequence) -> bool:
        """Moves a sequence from waiting to running with its first span, or returns False."""
        # A preempted one may still wait for its last token, without which it cannot be recomputed.
        if sequence.num_in_flight or not draft.has_room_for(sequence):
            return False
        hits = self._lookup(sequence)
        if len(hits) >= draft.grants_left:
            if draft.others or draft.admitted:
                return False
            # The next step may have no more room than this one: a shorter hit, but no starvation.
            hits = hits[: max(0, draft.grants_left - 1)]
        start = len(hits) * self._page_size
        span = span_for(sequence, start, draft, draft.grants_left * self._page_size)
        if span is None:
            return False
        num_new = self._num_pages_for(span) - len(hits)
        num_reserve = self._num_reserve_pages if self.running else 0
        if self._pool.num_free - self._pool.count_free(hits) < num_new + num_reserve:
            return False
        self._pool.share(hits)
        draft.grant(sequence, hits + self._take(num_new))
        draft.admit(span)
        self._start(sequence, start)
        return True

    def _lookup(self, sequence: Sequence) -> list[int]:
        if sequence.num_scored < sequence.num_prompt - 1:
            return []  # a position that is not computed has no logits to score with
        request = sequence.request
        return self._prefix_cache.lookup(sequence.digests, sequence.tokens, request.cache_salt)

    def _start(self, sequence: Sequence, num_cached: int) -> None:
        """Moves the first waiting sequence to the running ones and into a slot."""
        del self.waiting[0]
        insort(self.running, sequence, key=_key_of)
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.num_computed = num_cached
        sequence.num_registered = num_cached // self._page_size
        if sequence.num_cached is None:
            sequence.num_cached = num_cached
            if self._prefix_cache.enabled and sequence.request.params.prompt_logprobs is None:
                self.totals.prefix_queries += sequence.num_prompt
                self.totals.prefix_hits += num_cached

    def _num_pages_for(self, span: Span) -> int:
        return -(-(span.start + span.count) // self._page_size)

    def _take(self, count: int) -> list[int]:
        pages = self._pool.take(count)
        assert pages is not None, f"{count=} {self._pool.num_free=}"
        self._prefix_cache.evict(pages)
        return pages

    def _grow(self, draft: Draft, sequence: Sequence) -> bool:
        """Gives a running sequence one page, preempting those behind it if none is free.

        The last in order waits rather than preempt itself: it keeps what it has computed until
        one before it needs its pages.
        """
        if not draft.grants_left:
            return False
        while not self._pool.num_free:
            if self.running[-1] is sequence:
                return False
            self._preempt(draft, self.running[-1])
        draft.grant(sequence, self._take(1))
        return True

    def _preempt(self, draft: Draft, sequence: Sequence) -> None:
        draft.withdraw(sequence)
        draft.preempted.append(sequence)
        self.totals.num_preemptions += 1
        sequence.num_preemptions += 1
        self._release(sequence)
        sequence.num_computed = 0
        insort(self.waiting, sequence, key=_key_of)

    def _release(self, sequence: Sequence) -> None:
        """Takes slot and pages from a running sequence, or a waiting one out of the queue."""
        sequences = self.waiting if sequence.slot is None else self.running
        del sequences[bisect_left(sequences, sequence.key, key=_key_of)]
        if sequence.slot is not None:
            heapq.heappush(self._free_slots, sequence.slot)
            self._pool.free(sequence.pages)
            sequence.slot = None
            sequence.pages = []
            sequence.num_registered = 0

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._release(sequence)
        sequence.is_finished = True
        del self._sequences[sequence.request.request_id]
        self.totals.num_finished[reason] += 1

    def _advance(self, plan: StepPlan) -> None:
        """Records what the plan computes, as of its dispatch."""
        for span in plan.spans:
            span.sequence.num_computed += span.count
            span.sequence.num_in_flight += span.samples
        for span in plan.spans[plan.num_decode :]:
            sequence = span.sequence
            last_scored = min(span.start + span.count, sequence.num_prompt - 1)
            sequence.num_scored = max(sequence.num_scored, last_scored)
            # After all lookups of this plan: a span cannot read what another of its step writes.
            self._register(sequence)

    def _register(self, sequence: Sequence) -> None:
        """Makes the pages known whose tokens are known and whose last one is dispatched."""
        num_full = min(sequence.num_computed, len(sequence.tokens)) // self._page_size
        if num_full > sequence.num_registered:
            self._prefix_cache.register(
                sequence.digests,
                sequence.tokens,
                sequence.request.cache_salt,
                sequence.pages[:num_full],
                sequence.num_registered,
            )
            sequence.num_registered = num_full

    def _commit_token(
        self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None
    ) -> Update:
        params = sequence.request.params
        sequence.num_in_flight -= 1
        sequence.tokens.append(token)
        self._register(sequence)
        reason, stop_token = end_of(sequence, token)
        if reason is not None:
            self._finish(sequence, reason)
        is_first = sequence.num_outputs == 1
        self.totals.generation_tokens += 1
        self.totals.prompt_tokens += sequence.num_prompt if is_first else 0
        scores_prompt = is_first and params.prompt_logprobs is not None
        return Update(
            request_id=sequence.request.request_id,
            tokens=(token,),
            logprobs=() if logprobs is None or params.logprobs is None else (logprobs,),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if scores_prompt else None,
            finish_reason=reason,
            stop_token=stop_token,
            num_cached_tokens=sequence.num_cached or 0 if is_first else 0,
        )
