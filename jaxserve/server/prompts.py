"""From a completion's prompt as the client wrote it to what the engine gets: cut, or filled in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jaxserve.engine.info import EngineInfo
from jaxserve.errors import RequestError
from jaxserve.server.generate import check_length
from jaxserve.server.protocol.completions import CompletionRequest
from jaxserve.server.truncation import truncation_for
from jaxserve.text.infill import infill_prompt, infill_tokens
from jaxserve.text.tokenizer import Tokenizer

Prompt = str | list[int]


def prompt_reader(
    body: CompletionRequest,
    max_tokens: int | None,  # of the answer
    tokenizer: Tokenizer,
    info: EngineInfo,
) -> Callable[[Prompt], Prompt]:
    """Returns what to do with each of the request's prompts. Raises `RequestError`."""
    has_bos = body.add_special_tokens is not False
    truncation = truncation_for(body, max_tokens, info.max_model_len)
    if body.suffix:
        return _infill_reader(body, body.suffix, tokenizer, info)
    if truncation is not None:
        return partial(truncation.apply, tokenizer=tokenizer, add_special_tokens=has_bos)
    return partial(_checked, tokenizer=tokenizer, info=info)


def _checked(prompt: Prompt, *, tokenizer: Tokenizer, info: EngineInfo) -> Prompt:
    if isinstance(prompt, str):
        check_length(prompt, tokenizer, info.max_model_len, "prompt")
    return prompt


def _infill_reader(
    body: CompletionRequest, suffix: str, tokenizer: Tokenizer, info: EngineInfo
) -> Callable[[Prompt], Prompt]:
    if (marks := infill_tokens(tokenizer)) is None:
        raise RequestError(
            "suffix needs a model that fills in: this one's tokenizer has no "
            "<|fim_prefix|>, <|fim_suffix|> and <|fim_middle|>, nor others that mean the same",
            param="suffix",
        )
    check_length(suffix, tokenizer, info.max_model_len, "suffix")

    def read(prompt: Prompt) -> Prompt:
        return infill_prompt(
            _checked(prompt, tokenizer=tokenizer, info=info),
            suffix,
            marks,
            tokenizer,
            add_special_tokens=body.add_special_tokens is not False,
        )

    return read
