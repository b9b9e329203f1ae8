"""One rank of the data axis: its pages, its slots, and the sequences that run on it.

Ranks share a program and nothing else: a sequence computes where its pages are, until it ends or
is preempted. What each running sequence gets from the next step is decided here.

Host only: imports no jax.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from operator import attrgetter

from jaxserve.engine.draft import Draft, span_for
from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix_cache import PrefixCache
from jaxserve.engine.sequence import Sequence, Span

_key_of = attrgetter("key")


class Rank:
    """Owns the running sequences of one rank, their slots and, through the pool, their pages.

    Owned by the engine thread.
    """

    def __init__(
        self, index: int, pool: PagePool, prefix_cache: PrefixCache, *, num_slots: int
    ) -> None:
        self.running: list[Sequence] = []  # by key; others only read it
        self._index = index
        self._pool = pool
        self._prefix_cache = prefix_cache
        self._page_size = prefix_cache.page_size
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))  # a heap: low slots first
        # Room for the running to grow into, so that an admission is not preempted at once.
        self._num_reserve_pages = max(1, pool.num_pages // 100)

    @property
    def has_prefix_cache(self) -> bool:
        """True where prompts are looked up in what was computed before."""
        return self._prefix_cache.enabled

    @property
    def load(self) -> int:
        """How busy the rank is: pages in use, and one for each running sequence."""
        return len(self.running) + self._pool.num_pages - self._pool.num_free

    def check_idle(self) -> None:
        """Asserts that nothing is held: all pages and all slots are free."""
        assert not self.running
        assert len(self._free_slots) == self._num_slots, f"{self._index=} {self._free_slots=}"
        self._pool.check()
        self._prefix_cache.check()
        num_free = self._pool.num_free
        assert num_free == self._pool.num_pages, f"{self._index=} {num_free=}"

    def plan_running(self, draft: Draft) -> None:
        """Gives the running sequences their spans: decodes first, then prefills in order.

        Those preempted for it have left the rank; the draft names them.
        """
        for sequence in self._plan_decodes(draft):
            if draft.tokens_left == 0:
                break
            if sequence.slot is not None:
                self._plan_prefill(draft, sequence)

    def may_admit(self, draft: Draft, sequence: Sequence) -> bool:
        """Returns whether a slot and the step's limits, pages aside, allow one more sequence."""
        # Where somebody was just preempted pages are short: nobody new in the same step.
        if draft.preempted or not self._free_slots or not draft.tokens_left:
            return False
        return draft.has_room_for(sequence)

    def lookup(self, sequence: Sequence) -> list[int]:
        """Returns the pages that hold the start of a waiting sequence already."""
        if sequence.num_scored < sequence.num_prompt - 1:
            return []  # a position that is not computed has no logits to score with
        request = sequence.request
        return self._prefix_cache.lookup(sequence.digests, sequence.tokens, request.cache_salt)

    def admit(
        self,
        draft: Draft,
        sequence: Sequence,
        hits: list[int],  # as `lookup` found them
    ) -> bool:
        """Gives a waiting sequence a slot, pages and its first span, or returns False."""
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
        insort(self.running, sequence, key=_key_of)
        sequence.rank = self._index
        sequence.slot = heapq.heappop(self._free_slots)
        sequence.num_computed = start
        sequence.num_registered = len(hits)
        return True

    def register(self, sequence: Sequence) -> None:
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

    def release(self, sequence: Sequence) -> None:
        """Takes slot and pages from a running sequence."""
        assert sequence.rank == self._index and sequence.slot is not None, f"{sequence.rank=}"
        del self.running[bisect_left(self.running, sequence.key, key=_key_of)]
        heapq.heappush(self._free_slots, sequence.slot)
        self._pool.free(sequence.pages)
        sequence.rank = sequence.slot = None
        sequence.pages = []
        sequence.num_registered = 0

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
        if span_for(sequence, start, draft, sequence.max_total) is None:
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
        self.release(sequence)
        sequence.num_preemptions += 1
        sequence.num_computed = 0

    def _num_pages_for(self, span: Span) -> int:
        return -(-(span.start + span.count) // self._page_size)

    def _take(self, count: int) -> list[int]:
        pages = self._pool.take(count)
        assert pages is not None, f"{count=} {self._pool.num_free=}"
        self._prefix_cache.evict(pages)
        return pages
