"""Every option of the engine and the server, once: flags, TOML and `LLM(...)` keywords follow.

Host only: imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxserve.errors import ConfigError

T = TypeVar("T")
Auto = Literal["auto"]


def option(
    default: Any,
    help: str,
    *flags: str,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Returns a dataclass field with its help text, other flags that name it, and its range."""
    return dataclasses.field(
        default=default, metadata={"help": help, "flags": flags, "low": low, "high": high}
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine's options. "auto" is decided from the model and the device, and logged."""

    model: str = option("demo", "folder, .gguf file, Hugging Face id, or `demo`")
    tokenizer: str | Auto = option("auto", "folder or Hub id of the tokenizer, if not the model's")
    revision: str = option("main", "Hub revision of the model")
    load_format: Literal["auto", "dummy"] = option("auto", "`dummy` makes random weights")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "type of the weights")
    quantization: Literal["auto", "int8", "int4", "fp8"] = option(
        "auto",
        "type that layers' matrices are quantised to at load (embeddings and head are not; int4 "
        "leaves those of keys and values int8); "
        "`auto` keeps what the checkpoint has, quantised or not",
    )
    kv_cache_dtype: Literal[
        "auto", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2", "int8"
    ] = option(
        "auto",
        "type of the KV cache: `auto` is the weights', `fp8` is fp8_e4m3; fp8 and int8 take the "
        "checkpoint's scales, else fp8 takes 1 and int8 measures its own",
    )
    attention_backend: Literal["auto", "reference", "tpu", "gpu", "triton"] = option(
        "auto",
        "attention kernel; `auto` is the one made for the device, else the reference; `reference` "
        "keeps experts and quantised products off kernels, too",
    )
    max_model_len: int | Auto = option("auto", "context length in tokens", low=1)
    max_num_seqs: int | Auto = option(
        "auto", "sequences of each data rank that run at once (slots)", low=1
    )
    max_num_batched_tokens: int | Auto = option(
        "auto", "tokens that each data rank computes in one step at most", low=1
    )
    page_size: int | Auto = option("auto", "token positions in one KV page", "--block-size", low=1)
    num_pages: int | Auto = option(
        "auto", "KV pages of each data rank, overriding memory", "--num-gpu-blocks-override", low=1
    )
    kv_cache_memory_bytes: int | Auto = option(
        "auto", "memory of each device for KV pages, e.g. `2GiB`", low=1
    )
    gpu_memory_utilization: float = option(
        0.9, "part of device memory to use, where it is known", low=0.01, high=1.0
    )
    enable_prefix_caching: bool = option(True, "reuse pages of equal prompt prefixes")
    scheduling_policy: Literal["fcfs", "priority"] = option("fcfs", "order of waiting requests")
    max_num_queued_reqs: int | Auto = option("auto", "waiting requests before 429", low=1)
    mesh: str = option(
        "1", "devices as data x tensor, e.g. `2x4`, or data x expert x tensor, e.g. `1x2x4`"
    )
    max_logprobs: int = option(
        20, "most logprobs a request may ask for; -1 is the vocabulary", low=-1
    )
    seed: int = option(
        0, "seed of LLM's unseeded requests and of dummy weights", low=0, high=2**32 - 1
    )
    compile_cache_dir: str = option("auto", "persistent compile cache; empty turns it off")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP server's options."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 picks a free one", low=0, high=65535)
    api_key: tuple[str, ...] = option((), "key that clients must bring (or JAXSERVE_API_KEY)")
    served_model_name: tuple[str, ...] = option((), "name clients use; the first is returned")
    chat_template: str = option("", "file or text of a chat template, over the model's own")
    tool_call_parser: Literal[
        "auto",
        "none",
        "hermes",
        "qwen3_json",
        "qwen3_xml",
        "qwen3_coder",
        "llama3_json",
        "mistral",
        "pythonic",
        "gemma4",
        "functiongemma",
        "deepseek_v3",
        "deepseek_v31",
        "openai",
    ] = option("auto", "how the model writes tool calls; `auto` asks its chat template")
    reasoning_parser: Literal[
        "auto",
        "none",
        "deepseek_r1",
        "deepseek_v3",
        "qwen3",
        "glm45",
        "granite",
        "gemma4",
        "openai_gptoss",
    ] = option("auto", "how the model marks its thinking; `auto` asks its chat template")
    trust_request_chat_template: bool = option(
        False, "take chat templates from requests; each is rendered in a process with limits"
    )
    response_role: str = option("assistant", "role of generated messages")
    generation_config: Literal["auto", "jaxserve", "vllm"] = option(
        "auto", "`auto` takes sampling defaults from the model, the others take none"
    )
    override_generation_config: str = option(
        "", 'sampling defaults as JSON, over the model\'s, e.g. `{"temperature": 0.5}`'
    )
    max_body_bytes: int = option(32 * 2**20, "largest request body, e.g. `32MiB`", low=1)
    body_timeout_s: float = option(60.0, "time for a request body to arrive", low=0.01)
    header_timeout_s: float = option(10.0, "time for request headers to arrive", low=0.01)
    shutdown_timeout: float = option(
        30.0, "seconds running requests get to finish on SIGTERM", low=0.0
    )
    max_stored_responses: int = option(
        1024, "responses kept for /v1/responses/ID and previous_response_id; 0 keeps none", low=0
    )
    max_stored_response_bytes: int = option(
        64 * 2**20, "memory for stored responses, e.g. `64MiB`; those used last are kept", low=1
    )
    enable_prompt_tokens_details: bool = option(False, "report cached prompt tokens in usage")
    enable_force_include_usage: bool = option(
        False, "end every stream with its usage, whether asked for or not"
    )
    enable_request_id_headers: bool = option(False, "answer with the header X-Request-Id")
    enable_tokenizer_info_endpoint: bool = option(False, "serve GET /tokenizer_info")
    disable_docs: bool = option(
        False, "serve neither /docs nor /openapi.json", "--disable-fastapi-docs"
    )
    stream_interval: int = option(1, "tokens in a chunk of a stream", low=1)
    sse_keep_alive_interval: float = option(
        0.0, "seconds after which a silent stream sends a comment; 0 is never", low=0.0
    )
    coordinator: str | Auto = option(
        "auto",
        "HOST:PORT of process 0, where several run one model; `auto` asks Slurm, Kubernetes or "
        "Cloud TPU, and is one process elsewhere",
    )
    num_processes: int | Auto = option("auto", "processes that run the model together", low=1)
    process_id: int | Auto = option("auto", "which of them this is; 0 serves HTTP", low=0)
    health_port: int | Auto = option(
        "auto",
        "port where the other processes answer /health; `auto` is `port`, unless process 0 is on "
        "the same host or it is taken",
        low=0,
        high=65535,
    )
    join_timeout: float = option(300.0, "seconds to wait for all processes to come", low=1.0)
    step_timeout: float = option(
        60.0, "seconds after which a step of several processes counts as hung", low=1.0
    )
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "what to log")
    log_format: Literal["text", "json"] = option("text", "form of a log line")
    enable_log_requests: bool = option(
        False, "log a line for each request: id, path, status, counts and times, never its text"
    )


def compile_cache_path(config: EngineConfig) -> Path | None:
    """Returns the folder of the persistent compile cache; None when it is off."""
    if config.compile_cache_dir == "auto":
        return Path.home() / ".cache" / "jaxserve"
    return Path(config.compile_cache_dir).expanduser() if config.compile_cache_dir else None


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a config dataclass, as flags and tables need it."""

    name: str
    kind: type  # bool, int, float, str or tuple (of str)
    choices: tuple[str, ...]  # words taken besides values of `kind`; all there is when it is str
    is_closed: bool  # only `choices` are taken
    default: Any
    help: str
    aliases: tuple[str, ...]  # other names, spelt as `name` is
    low: float | None
    high: float | None


def options_of(cls: type) -> tuple[Option, ...]:
    """Returns the options of a config dataclass in the order of its fields."""
    hints = typing.get_type_hints(cls)
    return tuple(_option_of(field, hints[field.name]) for field in dataclasses.fields(cls))


def from_table(cls: type[T], table: dict[str, Any]) -> T:
    """Builds `cls` from keywords or a TOML table, checking every value.

    Dashes may stand for underscores. Raises `ConfigError` for an unknown key, naming the nearest,
    and for a value of the wrong type or out of range.
    """
    options = options_of(cls)
    by_name = {name: item for item in options for name in (item.name, *item.aliases)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        item = by_name.get(key.replace("-", "_"))
        if item is None:
            raise ConfigError(f"unknown option {key!r}{_hint(key, tuple(by_name))}")
        if item.name in values:
            raise ConfigError(f"{item.name} is given twice, once as {key!r}")
        values[item.name] = check_value(item, value)
    return cls(**values)


def parse_text(item: Option, text: str) -> Any:
    """Returns the value that a flag's text stands for; raises `ConfigError` if it stands for none.

    Integers take sizes as vLLM writes them: `32k` is 32,000, `32K` and `32KiB` are 32,768.
    """
    if item.kind is float:
        try:
            return check_value(item, float(text))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{item.name} is {text!r}; it must be a number") from None
    return check_value(item, text)


def check_value(item: Option, value: Any) -> Any:
    """Returns a table's value in its final type; raises `ConfigError` if it is not one."""
    if isinstance(value, str) and value in item.choices:
        return value
    if item.is_closed:
        raise ConfigError(f"{item.name} is {value!r}; it must be one of {', '.join(item.choices)}")
    if item.kind is tuple:
        words = (value,) if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(w, str) for w in words):
            raise ConfigError(f"{item.name} is {value!r}; it must be a list of strings")
        return tuple(words)
    if item.kind is int and isinstance(value, str):
        value = _parse_size(item, value)
    if item.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not item.kind:
        raise ConfigError(f"{item.name} is {value!r}; it must be {_kind_in_words(item)}")
    _check_range(item, value)
    return value


def nearest(word: str, known: Sequence[str]) -> str | None:
    """Returns the known word most like `word`, if any is like it."""
    import difflib  # only on the way to an error: keeps `--help` quick

    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def _option_of(field: dataclasses.Field[Any], hint: Any) -> Option:
    parts = typing.get_args(hint) if _is_union(hint) else (hint,)
    choices = tuple(
        word
        for part in parts
        if typing.get_origin(part) is Literal
        for word in typing.get_args(part)
    )
    kinds = [
        typing.get_origin(part) or part
        for part in parts
        if typing.get_origin(part) is not Literal and part is not types.NoneType
    ]
    return Option(
        name=field.name,
        kind=kinds[0] if kinds else str,
        choices=choices,
        is_closed=not kinds,
        default=field.default,
        help=field.metadata["help"],
        aliases=tuple(flag.lstrip("-").replace("-", "_") for flag in field.metadata["flags"]),
        low=field.metadata["low"],
        high=field.metadata["high"],
    )


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


# Lower case is decimal and upper case binary, as in vLLM's flags; `GB` and `GiB` as in SI and IEC.
_SUFFIXES = {"": 1, "kB": 10**3} | {
    suffix: factor
    for power, letter in enumerate("kmgt", 1)
    for suffix, factor in (
        (letter, 10 ** (3 * power)),
        (letter.upper(), 2 ** (10 * power)),
        (letter.upper() + "iB", 2 ** (10 * power)),
        (letter.upper() + "B", 10 ** (3 * power)),
    )
}


def _parse_size(item: Option, text: str) -> int:
    match = re.fullmatch(r"(-?\d{1,18})(?:\.(\d{1,9}))?([a-zA-Z]*)", text.strip(), re.ASCII)
    if match is not None and match[3] in _SUFFIXES:
        decimals = match[2] or ""
        value, rest = divmod(
            int(match[1] + decimals) * _SUFFIXES[match[3]],
            10 ** len(decimals),
        )
        if rest == 0:
            return value
    raise ConfigError(f"{item.name} is {text!r}; it must be {_kind_in_words(item)}")


def _kind_in_words(item: Option) -> str:
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    also = "".join(f" or {choice!r}" for choice in item.choices)
    return words[item.kind] + also


def _check_range(item: Option, value: Any) -> None:
    if item.kind is float and not math.isfinite(value):
        raise ConfigError(f"{item.name} is {value}; it must be finite")
    if item.low is not None and value < item.low:
        raise ConfigError(f"{item.name} is {value}; it must be at least {item.low}")
    if item.high is not None and value > item.high:
        raise ConfigError(f"{item.name} is {value}; it must be at most {item.high}")


def _hint(key: str, known: tuple[str, ...]) -> str:
    near = nearest(key.replace("-", "_"), known)
    return f"; did you mean {near!r}?" if near else f"; known: {', '.join(known)}"
