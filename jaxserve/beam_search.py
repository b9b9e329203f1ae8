"""Beam search over an engine that only knows single steps: one request a beam and token.

Whoever drives it asks the engine for the likeliest next tokens of each beam; the prefix cache
makes that cost one token each. Ranking and ends are vLLM's. Host only: imports no jax.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.engine.request import SamplingParams, TokenLogprobs
from jaxserve.errors import RequestError

MAX_PENALTY = 100.0
Candidates = Sequence[tuple[int, float]]  # (token, logprob), likeliest first


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How beams are searched. Names are vLLM's.

    A beam of `length` tokens, the prompt's included, scores its logprob / length^length_penalty.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False  # whether the text ends with the EOS token's
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RequestError(f"{name} is {value!r}; it must be at least 1", param=name)
        if not -MAX_PENALTY <= self.length_penalty <= MAX_PENALTY:  # False for NaN
            raise RequestError(
                f"length_penalty is {self.length_penalty}; "
                f"it must be in [{-MAX_PENALTY:g}, {MAX_PENALTY:g}]",
                param="length_penalty",
            )

    @property
    def num_candidates(self) -> int:
        """Next tokens looked at for each beam: even if one half ends, the other fills the width."""
        return 2 * self.beam_width

    def check_logprobs(self, max_logprobs: int) -> None:
        """Raises `RequestError` if the engine does not report enough candidates."""
        if self.num_candidates > max_logprobs:
            raise RequestError(
                f"beam search with {self.beam_width} beams needs {self.num_candidates} logprobs; "
                f"the limit is {max_logprobs} (--max-logprobs)",
                param="n",
            )


@dataclass(frozen=True, kw_only=True)
class Beam:
    """One continuation."""

    tokens: tuple[int, ...] = ()  # generated, the EOS that ended it included
    positions: tuple[TokenLogprobs, ...] = ()  # one for each of `tokens`
    cumulative_logprob: float = 0.0
    has_ended: bool = False  # by EOS

    def extended(self, token: int, logprob: float, top: Candidates, *, ends: bool) -> Beam:
        """Returns the beam with one token more."""
        rank = 1 + sum(other > logprob for _, other in top)
        position = TokenLogprobs(token=token, logprob=logprob, rank=rank, top=tuple(top))
        return Beam(
            tokens=(*self.tokens, token),
            positions=(*self.positions, position),
            cumulative_logprob=self.cumulative_logprob + logprob,
            has_ended=ends,
        )


class _Step(NamedTuple):
    """A way to go on with a beam."""

    score: float  # of the beam that it makes
    beam: Beam
    token: int
    logprob: float
    top: Candidates
    ends: bool

    def taken(self) -> Beam:
        return self.beam.extended(self.token, self.logprob, self.top, ends=self.ends)


class BeamSearch:
    """The beams of one prompt. Whoever drives it owns it."""

    def __init__(
        self,
        prompt_tokens: Sequence[int],
        params: BeamSearchParams,
        *,
        eos_tokens: Collection[int],
        max_model_len: int,
    ) -> None:
        self.running: list[Beam] = [Beam()]
        self.prompt_tokens = tuple(prompt_tokens)
        self._params = params
        self._eos_tokens = frozenset() if params.ignore_eos else frozenset(eos_tokens)
        self._num_left = min(params.max_tokens, max_model_len - len(prompt_tokens))
        self._ended: list[Beam] = []

    @property
    def step_params(self) -> SamplingParams:
        """What to ask the engine for each of `prompts`."""
        return SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=self._params.num_candidates, detokenize=False
        )

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """What the running beams are so far, prompt included; empty when the search is over."""
        if not self._num_left or self._is_decided():
            return []
        return [self.prompt_tokens + beam.tokens for beam in self.running]

    def advance(
        self,
        candidates: Sequence[Candidates],  # of each running beam
    ) -> None:
        """Extends every running beam by its candidates and keeps the best."""
        steps: list[_Step] = []
        for beam, top in zip(self.running, candidates, strict=True):
            for token, logprob in top:
                ends = token in self._eos_tokens
                total = beam.cumulative_logprob + logprob
                score = self._scaled(total, len(beam.tokens) + (not ends))
                steps.append(_Step(score, beam, token, logprob, top, ends))
        # Beams are long: only those that stay are made.
        steps.sort(key=lambda step: step.score, reverse=True)
        width = self._params.beam_width
        going, ending = (
            [step.taken() for step in [one for one in steps if one.ends == ends][:width]]
            for ends in (False, True)
        )
        self.running, self._ended = going, self._best_of([*self._ended, *ending])
        self._num_left -= 1

    def best(self) -> list[Beam]:
        """Returns the `beam_width` best of all beams, best first."""
        return self._best_of([*self._ended, *self.running])

    def _best_of(self, beams: Sequence[Beam]) -> list[Beam]:
        return sorted(beams, key=self._score, reverse=True)[: self._params.beam_width]

    def _score(self, beam: Beam) -> float:
        return self._scaled(beam.cumulative_logprob, len(beam.tokens) - beam.has_ended)

    def _scaled(self, logprob: float, num_tokens: int) -> float:
        return logprob / (len(self.prompt_tokens) + num_tokens) ** self._params.length_penalty

    def _is_decided(self) -> bool:
        """True when no running beam can still come among the best: logprobs only fall."""
        if len(self._ended) < self._params.beam_width:
            return False
        worst = self._score(self._ended[-1])
        for beam in self.running:
            num_tokens = len(beam.tokens)
            lengths = (num_tokens, num_tokens + self._num_left)
            if max(self._scaled(beam.cumulative_logprob, length) for length in lengths) > worst:
                return False
        return True
