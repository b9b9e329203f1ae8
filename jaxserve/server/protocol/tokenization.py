"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the requests and the replies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.errors import RequestError


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # true for a prompt, false for messages
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None

    def check(self) -> None:
        """Raises `RequestError` unless there is one thing to tokenize."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise RequestError(
                "continue_final_message needs add_generation_prompt: false",
                param="continue_final_message",
            )


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """The reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """The body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Detokenized:
    """The reply of /detokenize."""

    prompt: str


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The reply of /tokenizer_info, in the words of tokenizer_config.json."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    vocab_size: int
    model_max_length: int
    chat_template: str | None
    tokenizer_class: str = "PreTrainedTokenizerFast"
