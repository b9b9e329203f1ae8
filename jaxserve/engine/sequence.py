"""A request in flight, and what one step does for the sequences in it.

Host only: imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from jaxserve.engine.request import FinishReason, Request, TokenLogprobs

if TYPE_CHECKING:
    from jaxserve.engine.grammar import Matcher


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request in flight. Changed by the scheduler only, but for `started_s`, on its thread.

    Positions, with a token in flight:

        [0, num_computed)                    keys and values are computed by dispatched steps
        [num_computed, len(tokens))          known on the host, to be computed
        [len(tokens), + num_in_flight)       sampled by a dispatched step, known on the device only
    """

    request: Request
    key: tuple[int, int]  # (priority, order of arrival): smaller is served first, preempted last
    eos_tokens: frozenset[int]  # empty if the request ignores them
    end_tokens: frozenset[int]  # `eos_tokens` and the request's stop tokens
    max_total: int  # prompt and outputs together reach at most this many tokens
    tokens: list[int]  # prompt, then committed outputs
    num_prompt: int
    num_scored: int  # prompt tokens whose logprobs are dispatched, or were never asked for
    matcher: Matcher | None = None  # of its grammar; it has seen all outputs that arrived
    num_computed: int = 0
    num_in_flight: int = 0
    num_preemptions: int = 0
    started_s: float = 0.0  # set by the core, which has the clock, when it is first admitted
    num_cached: int | None = None  # prompt tokens hit in the prefix cache when first admitted
    rank: int | None = None  # of the data axis; set while the sequence runs, as `slot` is
    slot: int | None = None  # of the rank's
    pages: list[int] = field(default_factory=list)  # of the rank's
    num_registered: int = 0  # of `pages`, known to the prefix cache
    digests: list[bytes] = field(default_factory=list)  # of full pages; survive preemption
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    is_finished: bool = False  # finished or aborted: what still arrives for it is dropped

    @property
    def num_outputs(self) -> int:
        """The number of committed output tokens."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """The number of tokens to compute, a token in flight included."""
        return len(self.tokens) + self.num_in_flight - self.num_computed

    @property
    def num_history(self) -> int:
        """The number of tokens whose values the device must be told at admission."""
        params = self.request.params
        return len(self.tokens) if params.has_penalties or params.bad_word_tokens else 0

    @property
    def is_wide(self) -> bool:
        """True when admission uploads lists of tokens: biases, allowed, banned or stop tokens."""
        params = self.request.params
        return bool(
            params.logit_bias
            or params.logprob_token_ids
            or params.allowed_token_ids is not None
            or params.bad_word_tokens
            or params.min_tokens > 0
        )


def sequence_for(
    request: Request,
    *,
    key: tuple[int, int],
    eos_tokens: frozenset[int],
    max_model_len: int,  # prompt and outputs together
    matcher: Matcher | None = None,
) -> Sequence:
    """Returns the sequence of a request that just arrived."""
    params = request.params
    assert (matcher is None) == (params.grammar is None), f"{params.grammar=}"
    num_prompt = len(request.prompt_tokens)
    max_tokens = max_model_len if params.max_tokens is None else params.max_tokens
    eos_tokens = frozenset() if params.ignore_eos else eos_tokens
    return Sequence(
        request=request,
        key=key,
        eos_tokens=eos_tokens,
        end_tokens=eos_tokens.union(params.stop_token_ids or ()),
        max_total=min(num_prompt + max_tokens, max_model_len),
        tokens=list(request.prompt_tokens),
        num_prompt=num_prompt,
        # Nothing precedes the first prompt token: it has no logprob, and one fewer is to score.
        num_scored=num_prompt - 1 if params.prompt_logprobs is None else 0,
        matcher=matcher,
        prompt_logprobs=[None],
    )


def end_of(sequence: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
    """Returns why `token`, just committed, ends its sequence, if so, and which stop token it is."""
    if token in sequence.end_tokens:
        if sequence.num_outputs >= sequence.request.params.min_tokens:
            return "stop", None if token in sequence.eos_tokens else token
    if sequence.matcher is not None and sequence.matcher.is_complete:
        return "stop", None
    return ("length" if len(sequence.tokens) >= sequence.max_total else None), None


# Span and SpanResult are tuples, not dataclasses: a step makes hundreds, and a frozen dataclass
# takes four times as long to build.
class Span(NamedTuple):
    """Positions [start, start + count) of a sequence, computed by one step.

    The last `num_rows` positions each need a row of logits: the very last one to sample the next
    token, if the span `samples`; those before it to score the prompt token that follows them.
    """

    sequence: Sequence
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    samples: bool  # it reaches the end of the known and in-flight tokens
    takes_device_token: bool  # its only token is in flight: the slot's last token on the device
    num_rows: int


class SpanResult(NamedTuple):
    """What a step brought for one span."""

    token: int | None  # None where the span does not sample
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the num_rows - samples first rows


class Grant(NamedTuple):
    """Pages that a sequence was given by one plan, hits of the prefix cache included."""

    sequence: Sequence
    first_index: int  # of the sequence's page table row
    pages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one step computes, on all ranks.

    Ranks, slots and pages are the sequences' own at the time of planning.
    """

    spans: tuple[Span, ...]  # decodes of all ranks first
    num_decode: int  # spans[:num_decode] have count 1, and sample
    grants: tuple[Grant, ...]
    admitted: tuple[Sequence, ...]  # got a slot: their parameters go to the device
    preempted: tuple[Sequence, ...]  # lost slot and pages; wait again, if no other rank took them
    num_sequences: int  # of the rank that has most
    num_tokens: int  # of the rank that has most
    num_rows: int  # of the rank that has most
    has_grammar: bool = False  # a span that samples has a matcher
    awaits_tokens: bool = False  # one of them has a token in flight, which its matcher must see
