"""`/v1/messages`, Anthropic's protocol: the request and the reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.errors import RequestError
from jaxserve.server.protocol.reasoning import Effort

MIN_THINKING_TOKENS = 1024

# Claude Code's context edit, which asks to clear nothing.
KEEP_THINKING = {"type": "clear_thinking_20251015", "keep": "all"}

# Fields that cannot be honoured, and the values that ask for nothing.
UNSUPPORTED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "container": (None,),
    "context_management": (None, {}, {"edits": []}, {"edits": [KEEP_THINKING]}),
    "diagnostics": (None,),
    "inference_geo": (None,),
    "mcp_servers": (None, []),
    "service_tier": (None, "auto", "standard_only"),
    "speed": (None, "standard"),
    "vllm_xargs": (None, {}),
}


class ContentBlock(msgspec.Struct, kw_only=True):
    """A block of a message: what it holds depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[ContentBlock] | None = None
    is_error: bool | None = None


class InputMessage(msgspec.Struct, kw_only=True):
    """One turn of the conversation."""

    role: str
    content: str | list[ContentBlock]


class MessageTool(msgspec.Struct, kw_only=True):
    """A tool of the client's; Anthropic's own cannot be honoured."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    input_examples: list[dict[str, Any]] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class MessageToolChoice(msgspec.Struct, kw_only=True):
    """Which tools the model may or must call."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOptions(msgspec.Struct, kw_only=True):
    """Whether the model thinks first."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputOptions(msgspec.Struct, kw_only=True):
    """What the answer looks like."""

    effort: Effort | None = None
    format: dict[str, Any] | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/messages/count_tokens: what makes the prompt."""

    messages: list[InputMessage]
    model: str | None = None
    system: str | list[ContentBlock] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None
    output_format: dict[str, Any] | None = None  # output_config.format's old name
    chat_template_kwargs: dict[str, Any] | None = None
    container: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    mcp_servers: Any = None
    service_tier: Any = None
    speed: Any = None
    vllm_xargs: Any = None

    def check(self) -> None:
        """Raises `RequestError` naming a field that is out of range or cannot be honoured."""
        for name, harmless in UNSUPPORTED_IN_MESSAGES.items():
            if getattr(self, name) not in harmless:
                raise RequestError(f"{name} is not supported by this server", param=name)
        thinking = self.thinking
        if thinking is None:
            return
        if thinking.type not in ("enabled", "disabled", "adaptive"):
            raise RequestError(
                f"thinking.type is {thinking.type[:100]!r}; it is enabled, disabled or adaptive",
                param="thinking.type",
            )
        if thinking.display not in (None, "summarized", "omitted"):
            raise RequestError(
                f"thinking.display is {thinking.display[:100]!r}; it is summarized or omitted",
                param="thinking.display",
            )
        budget = thinking.budget_tokens
        if thinking.type == "enabled" and (budget is None or budget < MIN_THINKING_TOKENS):
            raise RequestError(
                f"thinking.budget_tokens is {budget}; it must be at least {MIN_THINKING_TOKENS}",
                param="thinking.budget_tokens",
            )


class MessageRequest(CountRequest, kw_only=True):
    """The body of POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None
    cache_salt: str | None = None
    request_id: str | None = None

    def check(self) -> None:
        """Raises `RequestError` naming a field that is out of range or cannot be honoured."""
        super().check()
        if self.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {self.max_tokens}; it must be at least 1", param="max_tokens"
            )


@dataclass(frozen=True, kw_only=True)
class OutputTokensDetails:
    """What the output's tokens were for."""

    thinking_tokens: int


@dataclass(frozen=True, kw_only=True)
class MessageUsage:
    """What a message has cost, in tokens. Those read from the cache are not in `input_tokens`."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens_details: OutputTokensDetails | None = None


@dataclass(frozen=True, kw_only=True)
class TextBlock:
    """What the model said."""

    text: str
    citations: None = None
    type: str = "text"


@dataclass(frozen=True, kw_only=True)
class ThinkingBlock:
    """What the model thought."""

    thinking: str
    signature: str
    type: str = "thinking"


@dataclass(frozen=True, kw_only=True)
class ToolUseBlock:
    """A tool that the model calls."""

    id: str
    name: str
    input: Any
    type: str = "tool_use"


OutputBlock = TextBlock | ThinkingBlock | ToolUseBlock


@dataclass(frozen=True, kw_only=True)
class Message:
    """The reply."""

    id: str
    model: str
    content: list[OutputBlock]
    usage: MessageUsage
    stop_reason: str | None = None
    stop_sequence: str | None = None
    role: str = "assistant"
    type: str = "message"
