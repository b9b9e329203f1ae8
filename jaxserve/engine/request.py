"""What a client asks of the engine and what the engine answers: frozen values, token ids only.

Host only: imports no jax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jaxserve.engine.repetition import RepetitionDetection
from jaxserve.errors import RequestError
from jaxserve.structured_outputs import Grammar, StructuredOutputsParams

# "repetition" is found by the text side, as stop strings are: to the engine it is an abort.
FinishReason = Literal["stop", "length", "abort", "repetition"]

MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 64
MAX_EOS_TOKENS = 16  # of a model
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 8
MAX_LOGPROB_TOKENS = 128
MAX_SAMPLES = 128
ALL_LOGPROBS = -1  # as a number of logprobs: of the whole vocabulary


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Names and defaults are vLLM's.

    `top_k` 0 or -1 and `seed` None or -1 mean off, as vLLM's clients write them. A value out of
    range raises `RequestError` with the field's name. Text-valued fields (`stop`, `bad_words`,
    `structured_outputs`) are resolved by the text side; the engine reads `bad_word_tokens` and
    `grammar` only.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | tuple[str, ...] | list[str] | None = ()
    stop_token_ids: tuple[int, ...] | list[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | list[int] | None = ()  # told in the likeliest ones' place
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] | None = ()
    bad_word_tokens: tuple[tuple[int, ...], ...] = ()
    structured_outputs: StructuredOutputsParams | None = None
    grammar: Grammar | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    # Special tokens that are text although `skip_special_tokens` hides others: marks of calls.
    shown_special_tokens: tuple[str, ...] = ()
    repetition_detection: RepetitionDetection | None = None

    def __post_init__(self) -> None:
        # The only writes to a frozen value: list-valued arguments become tuples before use.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        object.__setattr__(
            self, "logprob_token_ids", tuple(dict.fromkeys(self.logprob_token_ids or ()))
        )
        object.__setattr__(self, "shown_special_tokens", tuple(self.shown_special_tokens))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        _check_numbers(self)
        _check_lists(self)
        _check_grammar(self)

    @property
    def is_greedy(self) -> bool:
        """True when the temperature asks for the most likely token."""
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        """True when the choice depends on which tokens came before."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    def check_vocabulary(self, vocab_size: int, max_logprobs: int) -> None:
        """Raises `RequestError` for a token outside the vocabulary or too many logprobs."""
        for param, tokens in (
            ("logit_bias", tuple(self.logit_bias or ())),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("stop_token_ids", self.stop_token_ids or ()),
            ("logprob_token_ids", self.logprob_token_ids or ()),
            ("bad_words", tuple(token for word in self.bad_word_tokens for token in word)),
        ):
            for token in tokens:
                if type(token) is not int or not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{param} holds token {token!r}; the vocabulary has {vocab_size} tokens",
                        param=param,
                    )
        for param, count in (
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ):
            if count == ALL_LOGPROBS and max_logprobs < vocab_size:
                raise RequestError(
                    f"{param} is -1, all {vocab_size} tokens; the limit is {max_logprobs}",
                    param=param,
                )
            if count is not None and count > max_logprobs:
                raise RequestError(f"{param} is {count}; the limit is {max_logprobs}", param=param)
        if (count := len(self.logprob_token_ids or ())) > max_logprobs:
            raise RequestError(
                f"logprob_token_ids has {count} entries; the limit is {max_logprobs}",
                param="logprob_token_ids",
            )


def _check_numbers(params: SamplingParams) -> None:
    """Raises `RequestError` for a number outside its range, NaN included."""
    for name, low, high in (
        ("temperature", 0.0, 2.0),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("typical_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
        ("repetition_penalty", 0.0, 100.0),
    ):
        value = _number(params, name)
        if not low <= value <= high:
            raise RequestError(f"{name} is {value}; it must be in [{low:g}, {high:g}]", param=name)
        if value == 0 and name in ("top_p", "typical_p", "repetition_penalty"):
            raise RequestError(f"{name} is {value}; it must be greater than 0", param=name)
    for name, low_int, high_int in (
        ("n", 1, MAX_SAMPLES),
        ("top_k", -1, 2**31 - 1),
        ("min_tokens", 0, 2**31 - 1),
        ("max_tokens", 1, 2**31 - 1),
        ("seed", -(2**63), 2**63 - 1),
        ("logprobs", ALL_LOGPROBS, 2**31 - 1),
        ("prompt_logprobs", ALL_LOGPROBS, 2**31 - 1),
    ):
        count = getattr(params, name)
        if count is None and name not in ("n", "top_k", "min_tokens"):
            continue
        if type(count) is not int:
            raise RequestError(f"{name} is {count!r}; it must be an integer", param=name)
        if not low_int <= count <= high_int:
            raise RequestError(
                f"{name} is {count}; it must be in [{low_int}, {high_int}]", param=name
            )
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}; max_tokens is {params.max_tokens}",
            param="min_tokens",
        )


def _number(params: SamplingParams, name: str) -> float:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}; it must be a finite number", param=name)
    return float(value)


def _check_lists(params: SamplingParams) -> None:
    """Raises `RequestError` for a list that is too long or holds what it may not."""
    for name, limit in (
        ("stop", MAX_STOP_STRINGS),
        ("stop_token_ids", MAX_STOP_TOKENS),
        ("logit_bias", MAX_LOGIT_BIAS),
        ("logprob_token_ids", MAX_LOGPROB_TOKENS),
        ("bad_words", MAX_BAD_WORDS),
        ("bad_word_tokens", MAX_BAD_WORDS),
    ):
        value = getattr(params, name)
        if value is not None and len(value) > limit:
            raise RequestError(f"{name} has {len(value)} entries; the limit is {limit}", param=name)
    for name in ("stop", "bad_words"):
        for text in getattr(params, name):
            if not isinstance(text, str) or not text:
                raise RequestError(f"{name} holds {text!r}; it takes non-empty strings", param=name)
    _check_tokens(params)


def _check_grammar(params: SamplingParams) -> None:
    """Raises `RequestError` for what is no description of an answer, or for two of them."""
    outputs = params.structured_outputs
    if outputs is not None and not isinstance(outputs, StructuredOutputsParams):
        raise RequestError(
            f"structured_outputs is a {type(outputs).__name__}; it takes StructuredOutputsParams",
            param="structured_outputs",
        )
    if outputs is not None and params.grammar is not None:
        raise outputs.error("the answer is constrained already")


def _check_tokens(params: SamplingParams) -> None:
    """Raises `RequestError` for tokens that leave no choice, or that the device cannot keep."""
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        raise RequestError(
            "allowed_token_ids is empty; no token could follow", param="allowed_token_ids"
        )
    if params.logprob_token_ids and params.logprobs is None:
        raise RequestError("logprob_token_ids needs logprobs", param="logprob_token_ids")
    if len({*(params.logprob_token_ids or ()), *(params.logit_bias or ())}) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias and logprob_token_ids hold more than {MAX_LOGIT_BIAS} tokens together",
            param="logprob_token_ids",
        )
    for word in params.bad_word_tokens:
        if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
            raise RequestError(
                f"bad_words holds a word of {len(word)} tokens; the limit is {MAX_BAD_WORD_TOKENS}",
                param="bad_words",
            )
    for token, bias in (params.logit_bias or {}).items():
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise RequestError(
                f"logit_bias[{token}] is {bias!r}; it must be in [-100, 100]", param="logit_bias"
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate. A client's n > 1 becomes n of these, seeds already told apart."""

    request_id: str
    prompt_tokens: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0  # smaller is served first under the priority policy
    cache_salt: str = ""  # prefix pages are shared only between equal salts
    arrival_s: float = 0.0  # time.monotonic() of the machine, for queue-time metrics


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the raw distribution (natural log)."""

    token: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...]  # (token, logprob): likeliest first, or as asked for by id


class Timeline(NamedTuple):
    """How the engine has dealt with a request so far, for metrics."""

    started_s: float  # time.monotonic() of the machine, when its first step was dispatched
    num_preemptions: int


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one step brought for one request. The last one has a `finish_reason` or an `error`."""

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token when asked for
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, when the prompt is done
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop_token_ids entry that ended it; None for EOS
    is_complete: bool = False  # its grammar allows no more: the last token is text, and no stop
    num_cached_tokens: int = 0  # prompt tokens whose pages were reused
    timeline: Timeline | None = None  # with the first token, the last, and after a preemption
    error: str | None = None  # the engine cannot finish it; the text says why
