"""The options of the commands other than `serve`, as dataclasses that flags are generated from.

Host only, and quick to import: `jaxserve --help` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxserve.config import option


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Prompts and sampling options of `jaxserve generate`; None leaves the default."""

    prompt: tuple[str, ...] = option((), "text to continue; repeat for several", "-p")
    chat: bool = option(False, "send each prompt as a user's message, through the chat template")
    max_tokens: int = option(128, "tokens to generate at most", low=1)
    min_tokens: int | None = option(None, "tokens to generate before an end is allowed")
    temperature: float | None = option(None, "0 takes the most likely token")
    top_p: float | None = option(None, "probability mass to sample from")
    top_k: int | None = option(None, "number of tokens to sample from")
    min_p: float | None = option(None, "least probability, relative to the most likely token")
    presence_penalty: float | None = option(None, "penalty for tokens already generated")
    frequency_penalty: float | None = option(None, "penalty for each time a token was generated")
    repetition_penalty: float | None = option(None, "factor against tokens seen so far")
    n: int | None = option(None, "samples for each prompt")
    stop: tuple[str, ...] = option((), "string that ends the text; repeat for several")
    ignore_eos: bool = option(False, "go on after the model's end of text")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Options of `jaxserve chat`. Without a URL the engine runs in this process."""

    url: str = option("", "server to talk to, e.g. http://127.0.0.1:8000")
    api_key: str = option("", "the server's key (or JAXSERVE_API_KEY)")
    model_name: str = option("", "model to ask the server for (default: its first)")
    system_prompt: str = option("", "message that opens the conversation")
    quick: str = option("", "send one message, print the answer and leave", "-q")
    temperature: float | None = option(None, "0 takes the most likely token")
    max_tokens: int = option(512, "tokens of one answer at most", low=1)


@dataclass(frozen=True, kw_only=True)
class CompleteOptions:
    """Options of `jaxserve complete`: texts to go on with, sent to a server."""

    url: str = option("http://127.0.0.1:8000", "the server")
    api_key: str = option("", "the server's key (or JAXSERVE_API_KEY)")
    model_name: str = option("", "model to ask the server for (default: its first)")
    quick: str = option("", "send one text, print what follows and leave", "-q")
    temperature: float | None = option(None, "0 takes the most likely token")
    max_tokens: int = option(128, "tokens to generate at most", low=1)


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Files of `jaxserve run-batch`, in OpenAI's batch format."""

    input_file: str = option("", "requests, one JSON object on each line", "-i")
    output_file: str = option("", "file for the replies", "-o")


@dataclass(frozen=True, kw_only=True)
class ServeBenchOptions:
    """Options of `jaxserve bench serve`: a load on a running OpenAI-compatible server."""

    base_url: str = option("http://127.0.0.1:8000", "the server", "--url")
    model: str = option("", "model to ask for (default: the server's first)")
    api_key: str = option("", "the server's key (or JAXSERVE_API_KEY)")
    num_prompts: int = option(100, "requests to send", low=1)
    request_rate: float | None = option(
        None, "requests started in a second, as a Poisson process (default: all at once)", low=0.001
    )
    max_concurrency: int | None = option(None, "requests in flight at most", low=1)
    random_input_len: int = option(128, "prompt tokens of each request", low=1)
    random_output_len: int = option(128, "tokens to generate at most", low=1)
    vocab_size: int = option(32000, "prompts are random tokens below it", low=2)
    ignore_eos: bool = option(False, "ask for the full output length")
    temperature: float = option(0.0, "sampling temperature", low=0.0)
    num_warmups: int = option(1, "requests sent first and not counted", low=0)
    seed: int = option(0, "seed of the prompts and of the arrival times", low=0)
    timeout: float = option(600.0, "seconds after which what still runs counts as failed", low=0.01)
    ready_check_timeout_sec: float = option(30.0, "seconds to wait for the server", low=0.0)
    save_result: str = option("", "file to write the figures to, as JSON")


@dataclass(frozen=True, kw_only=True)
class ThroughputBenchOptions:
    """Options of `jaxserve bench throughput`: offline, all prompts at once."""

    num_prompts: int = option(64, "prompts to generate from", low=1)
    input_len: int = option(128, "prompt tokens", low=1)
    output_len: int = option(128, "tokens generated from each prompt", low=1)
    save_result: str = option("", "file to write the figures to, as JSON")


@dataclass(frozen=True, kw_only=True)
class LatencyBenchOptions:
    """Options of `jaxserve bench latency`: offline, one batch again and again."""

    batch_size: int = option(8, "prompts in the batch", low=1)
    input_len: int = option(32, "prompt tokens", low=1)
    output_len: int = option(128, "tokens generated from each prompt", low=1)
    num_iters_warmup: int = option(1, "batches run first and not counted", low=0)
    num_iters: int = option(5, "batches to time", low=1)
    save_result: str = option("", "file to write the figures to, as JSON")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `jaxserve plan`."""

    device: Literal["v5e", "v6e", "v5p", "7x", "h100", "a100", "a10", "l4"] = option(
        "v5e", "device to compile for; none need be here"
    )
    recommend: bool = option(False, "compare meshes of all devices instead, without compiling")
