"""From a prompt and sampling parameters to engine requests, and from updates back to text.

`LLM` and the server share it. Host only: imports no jax.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.engine.info import EngineInfo
from jaxserve.engine.repetition import RepetitionWatch
from jaxserve.engine.request import (
    ALL_LOGPROBS,
    MAX_BAD_WORDS,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
    Update,
)
from jaxserve.errors import EngineStopped, PromptTooLong, RequestError
from jaxserve.text.detokenizer import TextDelta, TextStream
from jaxserve.text.grammar import grammar_for
from jaxserve.text.tokenizer import Tokenizer

_SEEDS = 2**63


def random_seed() -> int:
    """Returns a seed that nobody can guess."""
    return secrets.randbits(63)


def encode_prompt(
    prompt: str | Sequence[int],
    tokenizer: Tokenizer,
    info: EngineInfo,
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """Returns the tokens of a prompt, which may be tokens already, checked against the model.

    Raises `RequestError` for an empty prompt or an unknown token, and `PromptTooLong`.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("prompt is empty", param="prompt")
        tokens = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        tokens = list(prompt)
    if not tokens:
        raise RequestError("prompt has no tokens", param="prompt")
    strange = [token for token in tokens if type(token) is not int]
    if strange:
        raise RequestError(f"prompt holds {strange[0]!r}; tokens are integers", param="prompt")
    if min(tokens) < 0 or max(tokens) >= info.vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < info.vocab_size)
        raise RequestError(
            f"prompt holds token {wrong}; the vocabulary has {info.vocab_size} tokens",
            param="prompt",
        )
    if len(tokens) >= info.max_model_len:
        raise PromptTooLong(len(tokens), info.max_model_len)
    return tokens


def build_requests(
    request_id: str,
    prompt: str | Sequence[int],  # text, or tokens
    params: SamplingParams,
    *,
    tokenizer: Tokenizer,
    info: EngineInfo,
    add_special_tokens: bool = True,
    priority: int = 0,
    cache_salt: str = "",
    arrival_s: float | None = None,  # time.monotonic(); now, unless given
    draw_seed: Callable[[], int] = random_seed,  # for sampled requests that bring no seed
) -> list[Request]:
    """Returns one engine request for each of the `params.n` samples.

    Ids are `request_id`, or `request_id-0`, `-1`, ... for n > 1; sample i has the seed plus i.
    `max_tokens` is cut to what fits next to the prompt. Raises `RequestError`, naming the field.
    """
    if priority and info.scheduling_policy != "priority":
        raise RequestError(
            f"priority is {priority}; that needs the engine's scheduling_policy to be priority",
            param="priority",
        )
    tokens = tuple(encode_prompt(prompt, tokenizer, info, add_special_tokens=add_special_tokens))
    params = _resolve(params, len(tokens), tokenizer, info)
    seed = None if params.is_greedy else params.seed
    if seed in (None, -1) and not params.is_greedy:
        seed = draw_seed()
    arrival_s = time.monotonic() if arrival_s is None else arrival_s
    return [
        Request(
            request_id=f"{request_id}-{index}" if params.n > 1 else request_id,
            prompt_tokens=tokens,
            params=dataclasses.replace(
                params,
                n=1,
                seed=None if seed is None else (seed + index) % _SEEDS,
                # Equal for all samples: the first brings them.
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
            ),
            priority=priority,
            cache_salt=cache_salt,
            arrival_s=arrival_s,
        )
        for index in range(params.n)
    ]


def _resolve(
    params: SamplingParams, num_prompt: int, tokenizer: Tokenizer, info: EngineInfo
) -> SamplingParams:
    """Returns `params` as the engine needs them: text as tokens or grammar, a length that fits."""
    if params.stop and not params.detokenize:
        raise RequestError("stop needs detokenize to be true", param="stop")
    if params.max_tokens is not None and params.max_tokens > info.max_model_len:
        raise RequestError(
            f"max_tokens is {params.max_tokens}; the model's context holds {info.max_model_len}",
            param="max_tokens",
        )
    room = info.max_model_len - num_prompt
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    outputs = params.structured_outputs
    params = dataclasses.replace(
        params,
        max_tokens=max_tokens,
        min_tokens=min(params.min_tokens, max_tokens),
        bad_word_tokens=params.bad_word_tokens + _bad_word_tokens(params, tokenizer),
        structured_outputs=None,
        grammar=params.grammar if outputs is None else grammar_for(outputs, tokenizer),
    )
    params.check_vocabulary(info.vocab_size, info.max_logprobs)
    return _with_all_logprobs(params, info.vocab_size)


def _with_all_logprobs(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """Returns `params` with -1, the whole vocabulary, as the number it stands for."""
    counts = (params.logprobs, params.prompt_logprobs)
    if ALL_LOGPROBS not in counts:
        return params
    logprobs, prompt_logprobs = (vocab_size if count == ALL_LOGPROBS else count for count in counts)
    return dataclasses.replace(params, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


def _bad_word_tokens(params: SamplingParams, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Returns the token spellings of the bad words, at the start and in the middle of a text."""
    words: list[tuple[int, ...]] = []
    for word in params.bad_words or ():
        text = word.lstrip()
        plain = tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()
        if not plain:
            raise RequestError(f"bad_words holds {word!r}, which has no tokens", param="bad_words")
        spaced = tuple(tokenizer.encode(f" {text}", add_special_tokens=False))
        words.append(plain)
        # As vLLM: only where the space became part of the first token.
        if spaced[0] != plain[0] and len(spaced) == len(plain):
            words.append(spaced)
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(
            f"bad_words has {len(words)} spellings; the limit is {MAX_BAD_WORDS}",
            param="bad_words",
        )
    return tuple(words)


@dataclass(frozen=True, kw_only=True)
class TokenText:
    """A token as text, with its log-probability."""

    token: int
    text: str
    data: bytes  # exact; `text` has U+FFFD for part of a character
    logprob: float
    rank: int | None  # None where it was asked for by id: nobody has ranked it


@dataclass(frozen=True, kw_only=True)
class PositionLogprobs:
    """Log-probabilities at one position."""

    chosen: TokenText
    top: tuple[TokenText, ...]  # most likely first, or in the order of logprob_token_ids
    offset: int  # where the chosen token starts, in characters of the prompt or of the answer


def _until_repetition(update: Update, watch: RepetitionWatch) -> Update:
    """Returns `update` up to the token that completes a repetition, if one does."""
    for count, token in enumerate(update.tokens, 1):
        if watch.push(token) and not (count == len(update.tokens) and update.finish_reason):
            return dataclasses.replace(
                update,
                tokens=update.tokens[:count],
                logprobs=update.logprobs[:count],
                finish_reason="repetition",
                stop_token=None,
            )
    return update


class Delta(NamedTuple):
    """What one update brought to one sample. A tuple, as `TextDelta` is."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] | None = None  # one for each token when asked for
    prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # stop string or stop token; None for EOS and length
    num_cached_tokens: int = 0
    must_abort: bool = False  # a stop string ended it: the engine does not know yet
    offsets: tuple[int, ...] = ()  # where each shown token starts, in characters of the answer


class Assembler:
    """Turns the updates of one request into deltas. One thread at a time may use it."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        params = request.params
        self.is_finished = False
        self._tokenizer = tokenizer
        self._prompt_tokens = request.prompt_tokens
        self._with_logprobs = params.logprobs is not None
        self._is_listed = bool(params.logprob_token_ids)
        self._show_stop_token = params.include_stop_str_in_output
        self._repetition: RepetitionWatch | None = None
        if params.repetition_detection is not None:
            self._repetition = RepetitionWatch(params.repetition_detection)
        self._stream: TextStream | None = None
        if params.detokenize:
            self._stream = TextStream(
                tokenizer,
                prompt_tokens=request.prompt_tokens,
                stop=tuple(params.stop or ()),
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
                shown_special_tokens=params.shown_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )

    def push(self, update: Update) -> Delta:
        """Returns what `update` brought; nothing once the sample is finished.

        Raises `EngineStopped` if the engine gave the request up.
        """
        if self.is_finished:
            return Delta()
        if update.error is not None:
            self.is_finished = True
            raise EngineStopped(update.error)
        if self._repetition is not None:
            update = _until_repetition(update, self._repetition)
        shown = update.tokens
        ends_with_stop = update.finish_reason == "stop" and not update.is_complete
        if ends_with_stop and not self._show_stop_token:
            shown = shown[:-1]  # the EOS or stop token: part of the tokens, not of the text
        text = self._text_of(shown, update.finish_reason is not None)
        tokens = update.tokens if text.stop is None else update.tokens[: text.num_tokens]
        finish_reason = update.finish_reason if text.stop is None else "stop"
        self.is_finished = finish_reason is not None
        return Delta(
            text=text.text,
            tokens=tokens,
            logprobs=self._logprobs(update, tokens, text) if self._with_logprobs else None,
            prompt_logprobs=self._prompt_logprobs(update),
            finish_reason=finish_reason,
            stop_reason=update.stop_token if text.stop is None else text.stop,
            num_cached_tokens=update.num_cached_tokens,
            must_abort=self.is_finished and update.finish_reason in (None, "repetition"),
            offsets=text.offsets,
        )

    def _text_of(self, tokens: Sequence[int], final: bool) -> TextDelta:
        if self._stream is None:
            return TextDelta(num_tokens=len(tokens), offsets=(0,) * len(tokens))
        return self._stream.push(tokens, final)

    def _logprobs(
        self, update: Update, tokens: Sequence[int], text: TextDelta
    ) -> tuple[PositionLogprobs, ...]:
        end = 0 if self._stream is None else self._stream.num_chars
        offsets = (*text.offsets, end)  # a stop token that is not shown starts at the end
        return tuple(
            self._position(position, offset, is_listed=self._is_listed)
            for position, offset, _ in zip(update.logprobs, offsets, tokens, strict=False)
        )

    def _prompt_logprobs(self, update: Update) -> tuple[PositionLogprobs | None, ...] | None:
        if update.prompt_logprobs is None:
            return None
        stream = TextStream(self._tokenizer, skip_special_tokens=False)
        offsets = stream.push(self._prompt_tokens).offsets
        return tuple(
            None if position is None else self._position(position, offset)
            for position, offset in zip(update.prompt_logprobs, offsets, strict=True)
        )

    def _position(
        self, position: TokenLogprobs, offset: int, *, is_listed: bool = False
    ) -> PositionLogprobs:
        return PositionLogprobs(
            chosen=self._token_text(position.token, position.logprob, position.rank),
            top=tuple(
                self._token_text(token, logprob, None if is_listed else rank)
                for rank, (token, logprob) in enumerate(position.top, 1)
            ),
            offset=offset,
        )

    def _token_text(self, token: int, logprob: float, rank: int | None) -> TokenText:
        data = self._tokenizer.token_bytes(token)
        return TokenText(
            token=token,
            text=data.decode("utf-8", "replace"),
            data=data,
            logprob=logprob,
            rank=rank,
        )
