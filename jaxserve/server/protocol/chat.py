"""`/v1/chat/completions`: the request and the reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.errors import RequestError
from jaxserve.server.protocol.common import GenerationFields, Usage, check_fields
from jaxserve.server.protocol.reasoning import Effort

MAX_MESSAGES = 4096

UNSUPPORTED_IN_CHAT: dict[str, tuple[Any, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}


class ChatRequest(GenerationFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = None
    functions: Any = msgspec.UNSET
    function_call: Any = msgspec.UNSET
    chat_template: str | None = None
    echo: bool | None = None
    media_io_kwargs: Any = msgspec.UNSET
    mm_processor_kwargs: Any = msgspec.UNSET
    modalities: Any = msgspec.UNSET
    audio: Any = msgspec.UNSET
    prediction: Any = msgspec.UNSET
    web_search_options: Any = msgspec.UNSET
    return_prompt_text: bool | None = None

    def check(self) -> None:
        """Raises `RequestError` naming a field that is out of range or cannot be honoured."""
        check_fields(self, UNSUPPORTED_IN_CHAT)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        budget = self.thinking_token_budget
        if budget is not None and not 0 <= budget < 2**31:
            raise RequestError(
                f"thinking_token_budget is {budget}; it must be in [0, {2**31 - 1}]",
                param="thinking_token_budget",
            )
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise RequestError(
                "continue_final_message needs add_generation_prompt: false",
                param="continue_final_message",
            )

    def conversation(self) -> list[dict[str, Any]]:
        """Returns the messages. Raises `RequestError` when there are none or too many."""
        if not self.messages:
            raise RequestError("messages is empty", param="messages")
        if len(self.messages) > MAX_MESSAGES:
            raise RequestError(
                f"messages has {len(self.messages)} entries; the limit is {MAX_MESSAGES}",
                param="messages",
            )
        return self.messages


@dataclass(frozen=True, kw_only=True)
class TopLogprob:
    """One likely token."""

    token: str
    logprob: float
    bytes: list[int]


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The token chosen, and the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


@dataclass(frozen=True, kw_only=True)
class ChatLogprobs:
    """Log-probabilities of a message."""

    content: list[TokenLogprob]


@dataclass(frozen=True, kw_only=True)
class ChatChoice:
    """One sample."""

    index: int
    message: dict[str, Any]
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class ChatCompletion:
    """The reply."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    service_tier: str | None = None
    system_fingerprint: str | None = None
    prompt_logprobs: list[dict[int, dict[str, Any]] | None] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
