"""A load on a running OpenAI-compatible server: random prompts, streamed, timed at the client."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson

from jaxserve.address import Server, parse_server
from jaxserve.bench.client import EventParser, exchange
from jaxserve.bench.report import RequestResult, save, serve_figures, serve_table
from jaxserve.errors import JaxserveError
from jaxserve.options import ServeBenchOptions

MIN_CHECK_S = 1.0  # for the ready check's last try


def run_serve_bench(options: ServeBenchOptions) -> int:
    """Runs the load, prints the table and returns 0 when every request succeeded, else 1."""
    figures, errors = asyncio.run(measure(options))
    print(serve_table(figures))
    save(options.save_result, {**asdict(options), "api_key": "", **figures})
    if errors:
        print(f"{len(errors)} requests failed; the first: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


async def measure(options: ServeBenchOptions) -> tuple[dict[str, float], list[str]]:
    """Returns the figures of one run and the errors of the requests that failed.

    Raises `JaxserveError` when the server is not there.
    """
    server = parse_server(options.base_url, options.api_key)
    served = await _wait_until_ready(server, options.ready_check_timeout_sec)
    options = replace(options, model=options.model or served)
    rng = random.Random(options.seed)
    bodies = [_body(options, rng) for _ in range(options.num_warmups + options.num_prompts)]
    for body in bodies[: options.num_warmups]:
        try:
            async with asyncio.timeout(options.timeout):
                outcome = await _send(server, body)
        except TimeoutError:
            outcome = f"a warm-up did not finish in {options.timeout:g} s"
        if isinstance(outcome, str):
            raise JaxserveError(f"{options.base_url} answered: {outcome}")
    started = time.perf_counter()
    outcomes = await _send_all(server, bodies[options.num_warmups :], options, rng)
    duration_s = time.perf_counter() - started
    results = [outcome for outcome in outcomes if isinstance(outcome, RequestResult)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    return serve_figures(results, len(errors), duration_s), errors


async def _wait_until_ready(server: Server, timeout_s: float) -> str:
    """Returns the first model the server lists, once it answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), MIN_CHECK_S)):
                response = await exchange(server, "/v1/models")
            if response.status == 200:
                return str(orjson.loads(response.body)["data"][0]["id"])
            reason = _error_text(response)
        except (OSError, orjson.JSONDecodeError, LookupError, TypeError) as error:
            reason = str(error) or type(error).__name__
        if time.monotonic() > deadline:
            raise JaxserveError(f"no model server at {server.host}:{server.port}: {reason}")
        await asyncio.sleep(0.2)


def _body(options: ServeBenchOptions, rng: random.Random) -> bytes:
    # Token ids give prompts of exact length; the lowest ids are often special tokens.
    low = min(1000, options.vocab_size // 2)
    prompt = [rng.randrange(low, options.vocab_size) for _ in range(options.random_input_len)]
    body: dict[str, Any] = {
        "model": options.model,
        "prompt": prompt,
        "max_tokens": options.random_output_len,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        body["ignore_eos"] = True
    return orjson.dumps(body)


async def _send_all(
    server: Server, bodies: Sequence[bytes], options: ServeBenchOptions, rng: random.Random
) -> list[RequestResult | str]:
    """Returns one outcome for each body: a result, or the text of what went wrong."""
    seats = asyncio.Semaphore(options.max_concurrency or len(bodies))

    async def send_when_free(body: bytes) -> RequestResult | str:
        async with seats:
            return await _send(server, body)

    deadline = time.monotonic() + options.timeout
    tasks: list[asyncio.Task[RequestResult | str]] = []
    for body in bodies:
        if time.monotonic() > deadline:
            break
        tasks.append(asyncio.create_task(send_when_free(body)))
        if options.request_rate is not None:
            await asyncio.sleep(rng.expovariate(options.request_rate))
    await asyncio.wait(tasks, timeout=max(deadline - time.monotonic(), 0.0))
    late = f"not finished after {options.timeout:g} s"
    outcomes = [task.result() if task.done() else late for task in tasks]
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return outcomes + [late] * (len(bodies) - len(tasks))


@dataclass(kw_only=True)
class _Timeline:
    """When the tokens of one stream arrived; filled by the connection's callback."""

    first_s: float | None = None
    last_s: float = 0.0
    gaps: list[float] = field(default_factory=list)
    usage: dict[str, int] | None = None
    error: str | None = None

    def add(self, now: float, event: bytes) -> None:
        if event == b"[DONE]":
            return
        chunk = orjson.loads(event)
        if chunk.get("error"):
            self.error = str(chunk["error"].get("message", chunk["error"]))
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        if not chunk.get("choices"):
            return
        choice = chunk["choices"][0]
        if self.first_s is None:
            self.first_s = now
        elif choice.get("text") or not choice.get("finish_reason"):
            # A last chunk that only says why it ended brings no token: it is no gap.
            self.gaps.append(now - self.last_s)
        self.last_s = now


async def _send(server: Server, body: bytes) -> RequestResult | str:
    timeline = _Timeline()
    started = time.perf_counter()
    try:
        response = await exchange(server, "/v1/completions", body, on_event=timeline.add)
    except OSError as error:
        return str(error) or type(error).__name__
    if response.status != 200:
        return _error_text(response)
    if timeline.error is not None:
        return timeline.error
    if timeline.first_s is None:
        return "the stream held no token"
    if timeline.usage is None:
        return "the stream held no usage chunk (stream_options.include_usage)"
    return RequestResult(
        prompt_tokens=timeline.usage["prompt_tokens"],
        output_tokens=timeline.usage["completion_tokens"],
        ttft_s=timeline.first_s - started,
        itl_s=tuple(timeline.gaps),
        e2el_s=timeline.last_s - started,
    )


def _error_text(response: EventParser) -> str:
    try:
        return f"{response.status}: {orjson.loads(response.body)['error']['message']}"
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return f"{response.status}: {response.body[:200].decode(errors='replace')}"
