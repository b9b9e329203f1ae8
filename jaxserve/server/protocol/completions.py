"""`/v1/completions`: the request and the reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.errors import RequestError
from jaxserve.server.protocol.common import GenerationFields, Usage, check_fields

MAX_PROMPTS = 256

UNSUPPORTED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "thinking_token_budget": (None,),
    "prompt_embeds": (None,),
}


class CompletionRequest(GenerationFields, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]] | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    thinking_token_budget: Any = msgspec.UNSET
    prompt_embeds: Any = msgspec.UNSET

    def check(self) -> None:
        """Raises `RequestError` naming a field that is out of range or cannot be honoured."""
        check_fields(self, UNSUPPORTED_IN_COMPLETIONS)
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens is 0; that needs echo: true", param="max_tokens")
        if self.suffix and (self.echo or self.truncate_prompt_tokens is not None):
            raise RequestError(
                "suffix goes neither with echo nor with truncate_prompt_tokens", param="suffix"
            )

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts, each a text or token ids. Raises `RequestError` if there is none."""
        prompt = self.prompt
        if prompt is None or prompt == "" or prompt == []:
            raise RequestError("prompt is missing or empty", param="prompt")
        if isinstance(prompt, str):
            return [prompt]
        if all(isinstance(item, int) for item in prompt):
            return [prompt]  # type: ignore[list-item]
        kinds = {type(item) for item in prompt}
        if len(kinds) > 1 or int in kinds:
            raise RequestError("prompt mixes texts and token ids", param="prompt")
        if len(prompt) > MAX_PROMPTS:
            raise RequestError(
                f"prompt has {len(prompt)} entries; the limit is {MAX_PROMPTS}", param="prompt"
            )
        if any(not item for item in prompt):
            raise RequestError("prompt holds an empty entry", param="prompt")
        return prompt  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class CompletionLogprobs:
    """Log-probabilities of a choice; parallel lists, one entry for each token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


@dataclass(frozen=True, kw_only=True)
class CompletionChoice:
    """One sample of one prompt; `index` = prompt index * n + sample index."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, dict[str, Any]] | None] | None = None
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The reply."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: str = "text_completion"
    service_tier: str | None = None
    system_fingerprint: str | None = None
