"""Drives an engine core by hand, one step at a time, so that arrivals are exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.engine.core import EngineCore
from jaxserve.engine.grammar import GrammarCompiler
from jaxserve.engine.request import Request, SamplingParams, TokenLogprobs, Update


@dataclass
class Answer:
    """What an engine said about one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    is_complete: bool = False
    error: str | None = None

    def add(self, update: Update) -> None:
        """Appends one update."""
        self.error = update.error
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.prompt_logprobs = self.prompt_logprobs or update.prompt_logprobs
        self.finish_reason = update.finish_reason
        self.is_complete = update.is_complete
        self.num_cached_tokens = max(self.num_cached_tokens, update.num_cached_tokens)


def run(
    core: EngineCore,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    arrive_every: int = 0,  # steps between arrivals; 0: all at once
    compiler: GrammarCompiler | None = None,  # of requests with grammars
    may_fail: bool = False,
) -> list[Answer]:
    """Returns the answers to the prompts, in order; asserts that the engine is idle after."""
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    requests = [
        Request(request_id=str(index), prompt_tokens=tuple(prompt), params=one)
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]
    answers = [Answer() for _ in requests]
    num_added, num_steps = 0, 0
    while num_added < len(requests) or core.has_work:
        while num_added < len(requests) and num_steps >= num_added * arrive_every:
            grammar = requests[num_added].params.grammar
            matcher = None if grammar is None else compiler.matcher_for(grammar)
            core.add(requests[num_added], matcher)
            num_added += 1
        for update in core.step():
            answers[int(update.request_id)].add(update)
        num_steps += 1
    assert may_fail or [answer.error for answer in answers if answer.error] == []
    assert core.stats().num_pages_free == core.info.num_pages
    return answers


def tokens_of(answers: Sequence[Answer]) -> list[list[int]]:
    """Returns the answers' tokens."""
    return [answer.tokens for answer in answers]
