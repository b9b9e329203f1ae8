"""What `LLM` returns. Names are vLLM's.

Host only: imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.engine.request import FinishReason


@dataclass(frozen=True, kw_only=True)
class Logprob:
    """One token's log-probability (natural log) at one position."""

    logprob: float
    rank: int | None = None  # 1 is the most likely token
    decoded_token: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One sample for a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string; None for EOS and length

    def finished(self) -> bool:
        """True when nothing more will follow."""
        return self.finish_reason is not None


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request, on the `time.monotonic()` clock, in seconds."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its samples."""

    request_id: str
    prompt: str | None  # None if it was given as tokens
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class BeamSearchSequence:
    """One beam, prompt included."""

    tokens: list[int]
    text: str
    cum_logprob: float
    logprobs: list[dict[int, Logprob]]  # the candidates at each generated token
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class BeamSearchOutput:
    """A prompt's best beams, best first."""

    sequences: list[BeamSearchSequence]
