"""What every generating endpoint takes: sampling fields, stream options, and what is refused.

Unknown fields are accepted, as OpenAI's clients send many; a field that is known and cannot be
honoured is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from jaxserve.engine.repetition import RepetitionDetection
from jaxserve.engine.request import SamplingParams
from jaxserve.errors import RequestError
from jaxserve.server.protocol.beams import check_beams
from jaxserve.server.protocol.structured import RENAMED, structured_outputs_of

MAX_REQUEST_ID = 128
MAX_CACHE_SALT = 128
MAX_STOP_CHARS = 1024

# Field names that are SamplingParams' own: left out or null means the model's default.
SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "allowed_token_ids",
    "bad_words",
    "logprob_token_ids",
    "repetition_detection",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)

# Fields that cannot be honoured, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(RENAMED, (None,)),
    "guided_decoding_backend": (None,),
    "best_of": (None, 1),
    "prompt_logprob_token_ids": (None, []),
    "watermarking": (None,),
    "kv_transfer_params": (None,),
    "ec_transfer_params": (None,),
    "vllm_xargs": (None, {}),
    "return_weight_versions": (None, False),
    "routed_experts_prompt_start": (None, 0),
    "lora_request": (None,),
}


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(msgspec.Struct, kw_only=True):
    """The fields that completions and chat share."""

    model: str | None = None
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = msgspec.UNSET
    guided_regex: Any = msgspec.UNSET
    guided_choice: Any = msgspec.UNSET
    guided_grammar: Any = msgspec.UNSET
    guided_json_object: Any = msgspec.UNSET
    guided_whitespace_pattern: Any = msgspec.UNSET
    guided_decoding_backend: Any = msgspec.UNSET
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    best_of: Any = msgspec.UNSET
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprob_token_ids: Any = msgspec.UNSET
    stream_interval: int | None = None
    repetition_detection: RepetitionDetection | None = None
    watermarking: Any = msgspec.UNSET
    kv_transfer_params: Any = msgspec.UNSET
    ec_transfer_params: Any = msgspec.UNSET
    vllm_xargs: Any = msgspec.UNSET
    return_weight_versions: Any = msgspec.UNSET
    routed_experts_prompt_start: Any = msgspec.UNSET
    lora_request: Any = msgspec.UNSET


def check_fields(
    body: GenerationFields,
    unsupported: Mapping[str, tuple[Any, ...]],  # this endpoint's own, beside UNSUPPORTED
) -> None:
    """Raises `RequestError` naming a field that is out of range or cannot be honoured."""
    for name, harmless in (*UNSUPPORTED.items(), *unsupported.items()):
        value = getattr(body, name)
        if value is not msgspec.UNSET and value not in harmless:
            instead = f"; use {RENAMED[name]}" if name in RENAMED else ""
            raise RequestError(f"{name} is not supported by this server{instead}", param=name)
    _check_stream(body)
    check_beams(body)
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    if body.priority is not None and not -(2**63) <= body.priority < 2**63:
        raise RequestError(f"priority is {body.priority}; it must fit 64 bits", param="priority")
    salt = body.cache_salt
    if salt is not None and (not 1 <= len(salt) <= MAX_CACHE_SALT or re.search(r"[@/\\\0]", salt)):
        raise RequestError(
            f"cache_salt takes 1 to {MAX_CACHE_SALT} characters without @ / \\ and NUL",
            param="cache_salt",
        )
    for stop in [body.stop] if isinstance(body.stop, str) else body.stop or []:
        if len(stop) > MAX_STOP_CHARS:
            raise RequestError(
                f"stop holds {len(stop)} characters; the limit is {MAX_STOP_CHARS}", param="stop"
            )


def stream_options(body: GenerationFields, *, forces_usage: bool) -> StreamOptions:
    """Returns what the request's stream carries; the server may add the usage at its end."""
    options = body.stream_options or StreamOptions()
    return msgspec.structs.replace(options, include_usage=True) if forces_usage else options


def _check_stream(body: GenerationFields) -> None:
    if body.stream_interval is not None and body.stream_interval < 1:
        raise RequestError(
            f"stream_interval is {body.stream_interval}; it must be at least 1",
            param="stream_interval",
        )
    if (options := body.stream_options) is None:
        return
    if not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        raise RequestError(
            "continuous_usage_stats needs include_usage: true",
            param="stream_options.continuous_usage_stats",
        )


def sampling_params(
    body: GenerationFields,
    defaults: Mapping[str, Any],
    **fields: Any,  # those that the endpoints spell differently: max_tokens, logprobs
) -> SamplingParams:
    """Returns the request's parameters over the model's defaults. Raises `RequestError`."""
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    if body.logit_bias is not None:
        given["logit_bias"] = {_bias_token(key): bias for key, bias in body.logit_bias.items()}
    outputs = structured_outputs_of(body.response_format, body.structured_outputs)
    given["structured_outputs"] = outputs
    return SamplingParams(**{**defaults, **given, **fields})


def _bias_token(key: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", key):
        raise RequestError(
            f"logit_bias has the key {key[:40]!r}; its keys are token ids", param="logit_bias"
        )
    return int(key)


def check_request_id(request_id: str, param: str) -> str:
    """Returns the client's request id. Raises `RequestError` unless it is short and printable."""
    if not re.fullmatch(rf"[\x21-\x7e]{{1,{MAX_REQUEST_ID}}}", request_id):
        raise RequestError(
            f"{param} takes 1 to {MAX_REQUEST_ID} printable ASCII characters", param=param
        )
    return request_id


@dataclass(frozen=True, kw_only=True)
class PromptTokensDetails:
    """Where the prompt's tokens came from."""

    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class CompletionTokensDetails:
    """What the generated tokens were for."""

    reasoning_tokens: int


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a reply has cost, in tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None
