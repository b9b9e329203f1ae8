"""Decides what each step computes and for whom, and commits what it brought.

One rule covers prefill, chunked prefill, prefix hits and decode: a sequence has tokens to compute,
a step has a token budget. Decodes come first, then prefills in order, then admissions.

The ranks of the data axis run each step together, each with slots, pages and budgets of its own
(`Rank`). Requests wait in one queue and are bound to a rank only when one admits them, so that no
rank stands idle beside a queue; a preempted one may go on at another rank.

`plan_step` reserves slots and pages as it decides, since whether pages can be had (and who is
preempted for them) is itself the decision; what each span may compute is a pure function of the
sequence and of what is left (`span_for`). Timeline is recorded in one place, once the plan is
complete (`_advance`): from then on the plan must be dispatched, before the next one.

Host only: imports no jax.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

from jaxserve.engine.draft import Draft, plan_of
from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix_cache import PrefixCache
from jaxserve.engine.rank import Rank
from jaxserve.engine.request import FinishReason, Request, Timeline, TokenLogprobs, Update
from jaxserve.engine.sequence import Sequence, SpanResult, StepPlan, end_of, sequence_for
from jaxserve.errors import PromptTooLong, QueueFull, RequestError

if TYPE_CHECKING:
    from jaxserve.engine.grammar import Matcher

_key_of = attrgetter("key")

# What a page that is hit outweighs of a rank's load (`Rank.load`). Computing a page of prompt takes
# about as long as reading its keys and values in several hundred decode steps, an answer's worth:
# the rank that holds a prefix gets the sequence unless it is busier by more than twice the hit.
_HIT_WORTH = 2


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
    """Owns the sequences in flight, their order and, through the ranks, their slots and pages.

    Made for one step in flight while the next is planned:

        plan = plan_step(); dispatch(plan); commit(previous, results of previous)

    A token in flight counts: its successor is planned before the host knows it, and an end that
    only shows in the token (EOS) is seen one step late. Steps run in order on the device, so pages
    and slots may be given away while a step that uses them is still in flight.
    Owned by the engine thread.
    """

    def __init__(
        self,
        pools: Iterable[PagePool],  # of each rank
        prefix_caches: Iterable[PrefixCache],  # of each rank
        *,
        # All limits but `max_waiting` are of one rank.
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
        self._ranks: list[Rank] = []
        for pool, prefix_cache in zip(pools, prefix_caches, strict=True):
            assert page_size == prefix_cache.page_size, f"{page_size=} {prefix_cache.page_size=}"
            # Alone, the longest sequence must fit, or it would wait for ever.
            assert pages_per_sequence <= pool.num_pages, f"{pages_per_sequence=} {pool.num_pages=}"
            self._ranks.append(Rank(len(self._ranks), pool, prefix_cache, num_slots=num_slots))
        assert self._ranks
        assert pages_per_sequence <= max_page_grants, f"{pages_per_sequence=} {max_page_grants=}"
        assert max_model_len <= max_history_tokens, f"{max_model_len=} {max_history_tokens=}"
        assert max_wide_admissions > 0
        self.waiting: list[Sequence] = []  # by key; others only read it
        self.totals = SchedulerTotals()
        self._max_model_len = max_model_len
        self._max_waiting = max_waiting
        self._eos_tokens = frozenset(eos_tokens)
        self._has_prefix_caches = any(rank.has_prefix_cache for rank in self._ranks)
        self._has_priorities = policy == "priority"
        self._limits = {
            "tokens": max_step_tokens,
            "rows": max_step_rows,
            "grants": max_page_grants,
            "history": max_history_tokens,
            "wide": max_wide_admissions,
        }
        self._sequences: dict[str, Sequence] = {}
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        """True while any sequence is running or waiting."""
        return bool(self._sequences)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that hold a slot: by rank, then by key."""
        return [sequence for rank in self._ranks for sequence in rank.running]

    @property
    def num_running(self) -> int:
        """The number of sequences that hold a slot."""
        return sum(len(rank.running) for rank in self._ranks)

    @property
    def num_waiting(self) -> int:
        """The number of sequences that wait for a slot, preempted ones included."""
        return len(self.waiting)

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Puts a request in the queue, with the matcher of its grammar if it has one.

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
            matcher=matcher,
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
        drafts = [Draft(**self._limits) for _ in self._ranks]
        for rank, draft in zip(self._ranks, drafts, strict=True):
            rank.plan_running(draft)
            self.totals.num_preemptions += len(draft.preempted)
            for sequence in draft.preempted:
                insort(self.waiting, sequence, key=_key_of)
        while self.waiting and self._admit(drafts):
            pass
        plan = plan_of(drafts)
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
        assert not self._sequences and not self.waiting
        for rank in self._ranks:
            rank.check_idle()

    def _admit(self, drafts: list[Draft]) -> bool:
        """Moves the first waiting sequence to a rank with its first span, or returns False.

        Nobody overtakes the first, on any rank; any rank that has room takes it.
        """
        sequence = self.waiting[0]
        # A preempted one may still wait for its last token, without which it cannot be recomputed.
        if sequence.num_in_flight:
            return False
        offers = []
        for index, (rank, draft) in enumerate(zip(self._ranks, drafts, strict=True)):
            if rank.may_admit(draft, sequence):
                hits = rank.lookup(sequence)
                offers.append((rank.load - _HIT_WORTH * len(hits), index, hits))
        for _, index, hits in sorted(offers):
            if self._ranks[index].admit(drafts[index], sequence, hits):
                del self.waiting[0]
                self._count_cached(sequence)
                return True
        return False

    def _count_cached(self, sequence: Sequence) -> None:
        if sequence.num_cached is not None:
            return  # admitted before: it hits what it computed itself
        sequence.num_cached = sequence.num_computed
        if self._has_prefix_caches and sequence.request.params.prompt_logprobs is None:
            self.totals.prefix_queries += sequence.num_prompt
            self.totals.prefix_hits += sequence.num_cached

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.rank is None:
            del self.waiting[bisect_left(self.waiting, sequence.key, key=_key_of)]
        else:
            self._ranks[sequence.rank].release(sequence)
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
            assert sequence.rank is not None
            self._ranks[sequence.rank].register(sequence)

    def _commit_token(
        self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None
    ) -> Update:
        matcher = sequence.matcher
        if matcher is not None and matcher.error is not None:
            self._finish(sequence, "abort")
            reason = f"the answer could not be kept to its grammar: {matcher.error}"
            return Update(request_id=sequence.request.request_id, error=reason)
        params = sequence.request.params
        sequence.num_in_flight -= 1
        sequence.tokens.append(token)
        if sequence.rank is not None:  # else preempted: it holds no page
            self._ranks[sequence.rank].register(sequence)
        end_reason, stop_token = end_of(sequence, token)
        if end_reason is not None:
            self._finish(sequence, end_reason)
        is_first = sequence.num_outputs == 1
        self.totals.generation_tokens += 1
        self.totals.prompt_tokens += sequence.num_prompt if is_first else 0
        tells = is_first or end_reason is not None or sequence.num_preemptions
        scores_prompt = is_first and params.prompt_logprobs is not None
        return Update(
            request_id=sequence.request.request_id,
            tokens=(token,),
            logprobs=() if logprobs is None or params.logprobs is None else (logprobs,),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if scores_prompt else None,
            finish_reason=end_reason,
            stop_token=stop_token,
            is_complete=end_reason == "stop" and token not in sequence.end_tokens,
            num_cached_tokens=sequence.num_cached or 0 if is_first else 0,
            timeline=Timeline(sequence.started_s, sequence.num_preemptions) if tells else None,
        )
