"""`truncate_prompt_tokens` and `truncation_side`: prompts cut to a length before they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.errors import RequestError
from jaxserve.server.protocol.common import GenerationFields
from jaxserve.text.tokenizer import Tokenizer

WHOLE_CONTEXT = -1  # as truncate_prompt_tokens: what the answer leaves


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How a request's prompts are cut."""

    max_tokens: int
    keeps_end: bool

    def apply(
        self, prompt: str | Sequence[int], tokenizer: Tokenizer, *, add_special_tokens: bool
    ) -> list[int]:
        """Returns the tokens of a prompt, cut; a BOS that was put in front of a text stays."""
        if not isinstance(prompt, str):
            return self.cut(prompt)
        tokens = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        is_framed = add_special_tokens and tokens[:1] == [tokenizer.bos_id]
        return self.cut(tokens, num_kept=1 if is_framed else 0)

    def cut(self, tokens: Sequence[int], *, num_kept: int = 0) -> list[int]:
        """Returns at most `max_tokens` tokens, the first `num_kept` among them."""
        if len(tokens) <= self.max_tokens:
            return list(tokens)
        if not self.keeps_end:
            return list(tokens[: self.max_tokens])
        num_kept = min(num_kept, self.max_tokens)
        num_last = self.max_tokens - num_kept
        return [*tokens[:num_kept], *tokens[len(tokens) - num_last :]]


def truncation_for(
    body: GenerationFields,
    max_tokens: int | None,  # of the answer
    max_model_len: int,
) -> Truncation | None:
    """Returns how to cut the request's prompts; None when it asks for no cut.

    As in vLLM the prompt gets what the answer leaves of the context, and the end of a prompt is
    what stays unless `truncation_side` says otherwise. Raises `RequestError`.
    """
    if body.truncation_side not in (None, "left", "right"):
        raise RequestError(
            f"truncation_side is {body.truncation_side[:40]!r}; it must be 'left' or 'right'",
            param="truncation_side",
        )
    asked = body.truncate_prompt_tokens
    if asked is None:
        return None
    room = max_model_len - (max_tokens or 1)
    if asked != WHOLE_CONTEXT and not 1 <= asked <= max(room, 1):
        raise RequestError(
            f"truncate_prompt_tokens is {asked}; it must be -1 or in [1, {max(room, 1)}]: the "
            f"context holds {max_model_len}, of which the answer takes {max_tokens or 1}",
            param="truncate_prompt_tokens",
        )
    return Truncation(
        max_tokens=max(room, 1) if asked == WHOLE_CONTEXT else asked,
        keeps_end=body.truncation_side != "right",
    )
