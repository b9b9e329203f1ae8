"""A plan in the making: what each limit of a rank has left, and what was decided so far.

Host only: imports no jax.
"""

from __future__ import annotations

from jaxserve.engine.sequence import Grant, Sequence, Span, StepPlan


class Draft:
    """One rank's part of a plan: what is left of each limit, and what was decided so far."""

    __slots__ = (
        "admitted",
        "decodes",
        "grants",
        "grants_left",
        "history_left",
        "max_rows",
        "max_tokens",
        "others",
        "preempted",
        "rows_left",
        "tokens_left",
        "wide_left",
    )

    def __init__(self, *, tokens: int, rows: int, grants: int, history: int, wide: int) -> None:
        self.max_tokens = self.tokens_left = tokens
        self.max_rows = self.rows_left = rows
        self.grants_left = grants  # in pages
        self.history_left = history  # in tokens
        self.wide_left = wide
        self.decodes: dict[Sequence, Span] = {}
        self.others: dict[Sequence, Span] = {}
        self.grants: dict[Sequence, Grant] = {}
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []

    def has_room_for(self, sequence: Sequence) -> bool:
        """Returns whether the step can upload what the device must know of an admission."""
        if sequence.is_wide and not self.wide_left:
            return False
        return sequence.num_history <= self.history_left

    def admit(self, span: Span) -> None:
        """Adds the first span of a sequence that gets a slot."""
        self.admitted.append(span.sequence)
        self.history_left -= span.sequence.num_history
        self.wide_left -= span.sequence.is_wide
        self.add(span)

    def add(self, span: Span) -> None:
        """Adds a span to the plan."""
        is_decode = span.count == 1 and span.samples
        (self.decodes if is_decode else self.others)[span.sequence] = span
        self.tokens_left -= span.count
        self.rows_left -= span.num_rows

    def grant(self, sequence: Sequence, pages: list[int]) -> None:
        """Gives pages to a sequence, behind those it has."""
        if not pages:
            return
        if (earlier := self.grants.get(sequence)) is None:
            self.grants[sequence] = Grant(sequence, len(sequence.pages), tuple(pages))
        else:
            self.grants[sequence] = earlier._replace(pages=(*earlier.pages, *pages))
        self.grants_left -= len(pages)
        sequence.pages += pages

    def withdraw(self, sequence: Sequence) -> None:
        """Takes back what the plan gave to a sequence that is preempted after all."""
        span = self.decodes.pop(sequence, None) or self.others.pop(sequence, None)
        if span is not None:
            self.tokens_left += span.count
            self.rows_left += span.num_rows
        if (grant := self.grants.pop(sequence, None)) is not None:
            self.grants_left += len(grant.pages)


def plan_of(drafts: list[Draft]) -> StepPlan | None:
    """Returns the plan that all ranks' drafts make, or None if nothing is to be computed."""
    decodes: list[Span] = []
    others: list[Span] = []
    grants: list[Grant] = []
    admitted: list[Sequence] = []
    preempted: list[Sequence] = []
    for draft in drafts:
        decodes += draft.decodes.values()
        others += draft.others.values()
        grants += draft.grants.values()
        admitted += draft.admitted
        preempted += draft.preempted
    if not decodes and not others:
        return None
    spans = (*decodes, *others)
    matched = [span for span in spans if span.samples and span.sequence.matcher is not None]
    return StepPlan(
        spans=spans,
        num_decode=len(decodes),
        grants=tuple(grants),
        admitted=tuple(admitted),
        preempted=tuple(preempted),
        num_sequences=max([len(draft.decodes) + len(draft.others) for draft in drafts]),
        num_tokens=max([draft.max_tokens - draft.tokens_left for draft in drafts]),
        num_rows=max([draft.max_rows - draft.rows_left for draft in drafts]),
        has_grammar=bool(matched),
        awaits_tokens=any(span.takes_device_token for span in matched),
    )


def span_for(sequence: Sequence, start: int, draft: Draft, end_limit: int) -> Span | None:
    """Returns the longest span from `start` to at most `end_limit` that has room, or None."""
    num_known = len(sequence.tokens)
    num_total = num_known + sequence.num_in_flight
    end = min(num_total, start + draft.tokens_left, end_limit)
    # Each row belongs to one of the last positions: leaving out a position saves its row.
    end -= max(0, _num_rows_of(sequence, start, end) - draft.rows_left)
    if end <= start:
        return None
    num_rows = _num_rows_of(sequence, start, end)
    return Span(sequence, start, end - start, end == num_total, start >= num_known, num_rows)


def _num_rows_of(sequence: Sequence, start: int, end: int) -> int:
    """Returns the rows [start, end) needs: prompt tokens not scored yet, and one to sample."""
    first, last = max(start, sequence.num_scored), min(end, sequence.num_prompt - 1)
    samples = end == len(sequence.tokens) + sequence.num_in_flight
    return max(0, last - first) + samples
