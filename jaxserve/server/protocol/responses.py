"""`/v1/responses`: the request, the items of a conversation, and the reply."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson

from jaxserve.errors import RequestError
from jaxserve.server.protocol.reasoning import Effort

MAX_INPUT_ITEMS = 4096
MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

INCLUDE_LOGPROBS = "message.output_text.logprobs"
INCLUDE_REASONING = "reasoning.encrypted_content"

# Fields that cannot be honoured, and the values that ask for nothing.
UNSUPPORTED_IN_RESPONSES: dict[str, tuple[Any, ...]] = {
    "access_programs": (None, {}),
    "background": (None, False),
    "background_options": (None, {}),
    "context_management": (None, []),
    "conversation": (None,),
    "enable_response_messages": (None, False),
    "image": (None, {}),
    "moderation": (None,),
    "previous_input_messages": (None, []),
    "prompt": (None,),
    "service_tier": (None, "auto", "default"),
    "vllm_xargs": (None, {}),
}


class ContentPart(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A part of a message, of a reasoning or of a function's output."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One item of a conversation: what it holds depends on its type."""

    type: str | None = None  # None is a message
    id: str | None = None
    status: str | None = None
    role: str | None = None
    content: str | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """A tool; only functions can be honoured."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    """Which tools the model may or must call."""

    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[dict[str, Any]] | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True):
    """How the model thinks."""

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    """What the answer looks like."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries beside the text."""

    include_obfuscation: bool | None = None


class ResponseRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/responses."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    # Labels and hints of OpenAI's own service: echoed, and without an effect here.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    # vLLM's, as in chat.
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    enable_response_messages: Any = None
    image: Any = None
    moderation: Any = None
    previous_input_messages: Any = None
    prompt: Any = None
    service_tier: Any = None
    vllm_xargs: Any = None

    def check(self) -> None:
        """Raises `RequestError` naming a field that is out of range or cannot be honoured."""
        for name, harmless in UNSUPPORTED_IN_RESPONSES.items():
            if getattr(self, name) not in harmless:
                raise RequestError(f"{name} is not supported by this server", param=name)
        if not self.input and self.previous_response_id is None:
            raise RequestError("input is empty", param="input")
        if len(self.input) > MAX_INPUT_ITEMS and not isinstance(self.input, str):
            raise RequestError(
                f"input has {len(self.input)} items; the limit is {MAX_INPUT_ITEMS}", param="input"
            )
        for name in ("max_output_tokens", "max_tool_calls"):
            if (value := getattr(self, name)) is not None and not 1 <= value < 2**31:
                raise RequestError(f"{name} is {value}; it must be in [1, {2**31 - 1}]", param=name)
        _one_of("truncation", self.truncation, "auto", "disabled")
        self._check_include()
        self._check_options()
        _check_metadata(self.metadata or {})
        for name in ("text", "tools", "tool_choice"):
            _check_echo(name, getattr(self, name))

    def _check_include(self) -> None:
        for index, name in enumerate(self.include or ()):
            _one_of(f"include.{index}", name, INCLUDE_LOGPROBS, INCLUDE_REASONING)
        if self.top_logprobs and INCLUDE_LOGPROBS not in (self.include or ()):
            raise RequestError(
                f'top_logprobs needs include: ["{INCLUDE_LOGPROBS}"]', param="top_logprobs"
            )

    def _check_options(self) -> None:
        reasoning, text = self.reasoning or ReasoningOptions(), self.text or TextOptions()
        # "auto" is the most detailed summary there is; this server makes none.
        _one_of("reasoning.summary", reasoning.summary, "auto")
        _one_of("reasoning.generate_summary", reasoning.generate_summary, "auto")
        _one_of("reasoning.context", reasoning.context, "auto")
        _one_of("reasoning.mode", reasoning.mode, "standard")
        _one_of("text.verbosity", text.verbosity, "medium")
        options = self.stream_options
        if options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        if options is not None and options.include_obfuscation:
            raise RequestError(
                "stream_options.include_obfuscation is not supported by this server",
                param="stream_options.include_obfuscation",
            )


def _one_of(param: str, value: str | None, *known: str) -> None:
    if value is not None and value not in known:
        raise RequestError(
            f"{param} is {value[:100]!r}; this server takes {' and '.join(known)}", param=param
        )


def _check_echo(param: str, value: Any) -> None:
    """Raises `RequestError` for what the reply could not show, such as an integer of 30 digits."""
    try:
        orjson.dumps(msgspec.to_builtins(value))
    except orjson.JSONEncodeError as error:
        raise RequestError(f"{param} cannot be written as JSON: {error}", param=param) from error


def _check_metadata(metadata: dict[str, str]) -> None:
    if len(metadata) > MAX_METADATA:
        raise RequestError(
            f"metadata has {len(metadata)} entries; the limit is {MAX_METADATA}", param="metadata"
        )
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE:
            raise RequestError(
                f"metadata has a key of {len(key)} characters with a value of {len(value)}; "
                f"the limits are {MAX_METADATA_KEY} and {MAX_METADATA_VALUE}",
                param="metadata",
            )


@dataclass(frozen=True, kw_only=True)
class OutputText:
    """The text of a message."""

    text: str
    annotations: list[Any] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    type: str = "output_text"


@dataclass(frozen=True, kw_only=True)
class OutputMessage:
    """What the model said."""

    id: str
    status: str
    content: list[OutputText]
    role: str = "assistant"
    type: str = "message"


@dataclass(frozen=True, kw_only=True)
class ReasoningText:
    """The text of a reasoning."""

    text: str
    type: str = "reasoning_text"


@dataclass(frozen=True, kw_only=True)
class OutputReasoning:
    """What the model thought."""

    id: str
    status: str
    content: list[ReasoningText]
    encrypted_content: str | None = None
    summary: list[Any] = field(default_factory=list)
    type: str = "reasoning"


@dataclass(frozen=True, kw_only=True)
class OutputCall:
    """A function that the model calls."""

    id: str
    status: str
    call_id: str
    name: str
    arguments: str
    type: str = "function_call"


OutputItem = OutputMessage | OutputReasoning | OutputCall


@dataclass(frozen=True, kw_only=True)
class InputDetails:
    """Where the input's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class OutputDetails:
    """What the output's tokens were for."""

    reasoning_tokens: int


@dataclass(frozen=True, kw_only=True)
class ResponseUsage:
    """What a response has cost, in tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


@dataclass(frozen=True, kw_only=True)
class Response:
    """The reply, and every snapshot of it in a stream."""

    id: str
    created_at: int
    status: str
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: str
    completed_at: int | None = None
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any] = field(default_factory=dict)
    safety_identifier: str | None = None
    service_tier: str = "default"
    top_logprobs: int = 0
    usage: ResponseUsage | None = None
    user: str | None = None
    background: bool = False
    object: str = "response"
