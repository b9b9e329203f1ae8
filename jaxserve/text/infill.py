"""Prompts that ask for the middle between a prefix and a suffix, for models trained on that.

Host only: imports no jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.text.tokenizer import Tokenizer


class InfillTokens(NamedTuple):
    """What stands before the prefix, before the suffix, and before the middle."""

    prefix: int
    suffix: int
    middle: int


# As the tokenizers spell them: Qwen and CodeGemma, StarCoder, DeepSeek.
_SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


def infill_tokens(tokenizer: Tokenizer) -> InfillTokens | None:
    """Returns the tokens of a model that fills in; None for any other model."""
    for spelling in _SPELLINGS:
        prefix, suffix, middle = map(tokenizer.token_of, spelling)
        if prefix is not None and suffix is not None and middle is not None:
            return InfillTokens(prefix, suffix, middle)
    return None


def infill_prompt(
    prefix: str | Sequence[int],
    suffix: str,
    marks: InfillTokens,
    tokenizer: Tokenizer,
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """Returns the prompt after which the model writes the middle: prefix, suffix, middle."""
    if isinstance(prefix, str):
        tokens = tokenizer.encode(prefix, add_special_tokens=add_special_tokens)
    else:
        tokens = list(prefix)
    has_bos = tokens[:1] == [tokenizer.bos_id]
    return [
        *(tokens[:1] if has_bos else ()),
        marks.prefix,
        *tokens[has_bos:],
        marks.suffix,
        *tokenizer.encode(suffix, add_special_tokens=False),
        marks.middle,
    ]
