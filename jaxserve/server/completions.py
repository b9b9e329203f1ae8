"""POST /v1/completions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.engine.request import ALL_LOGPROBS, Request, SamplingParams
from jaxserve.errors import RequestError
from jaxserve.generation import Delta, PositionLogprobs, build_requests
from jaxserve.server.beams import admit
from jaxserve.server.body import read_body
from jaxserve.server.chunks import ChunkWriter
from jaxserve.server.events import JSON, EventStream, while_connected
from jaxserve.server.generate import (
    Generation,
    Outcome,
    Sample,
    arrival,
    collect,
    engine_id,
    finite,
    off_loop,
    priority_of,
    prompt_logprobs_body,
    shown,
    token_name,
)
from jaxserve.server.pacing import kept_alive
from jaxserve.server.prompts import prompt_reader
from jaxserve.server.protocol.common import StreamOptions, sampling_params, stream_options
from jaxserve.server.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from jaxserve.server.request_log import record_of
from jaxserve.server.state import ServerState
from jaxserve.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 1024  # prompts x n: each is a request of its own, with its prompt's tokens

_decoder = msgspec.json.Decoder(CompletionRequest)


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """What every part of one reply needs."""

    id: str
    created: int
    model: str
    body: CompletionRequest
    prompt_texts: Sequence[str]  # for echo; empty without
    tokenizer: Tokenizer
    generation: Generation
    stream_interval: int
    stream_options: StreamOptions


async def create_completion(http: HttpRequest) -> Response:
    """Returns a completion, or a stream of its chunks."""
    state: ServerState = http.app.state.server
    body = await read_body(http, _decoder)
    reply_id, arrival_s = arrival(http, body, "cmpl-")
    model = state.model_name_for(body.model)
    body.check()
    prompts = body.prompts()
    params = _params(body, state)
    _check_count(len(prompts), params.n)
    requests = await off_loop(
        partial(
            _build,
            body,
            prompts,
            params,
            engine_id(reply_id),
            state,
            priority=priority_of(http, body),
            arrival_s=arrival_s,
        ),
        sum(map(len, prompts)),
    )
    _, _, text = state.loaded()
    texts = _prompt_texts(body, prompts, requests, text.tokenizer) if body.echo else ()
    reply = _Reply(
        id=reply_id,
        created=int(time.time()),
        model=model,
        body=body,
        prompt_texts=texts,
        tokenizer=text.tokenizer,
        generation=await admit(state, body, requests, is_echo_only=body.max_tokens == 0),
        stream_interval=body.stream_interval or state.config.stream_interval,
        stream_options=stream_options(body, forces_usage=state.config.enable_force_include_usage),
    )
    record_of(http.scope).generation = reply.generation
    if body.stream:
        chunks = _chunk_writer(reply)
        return EventStream(
            kept_alive(chunks.stream(_writer(reply, chunks)), state.config.sse_keep_alive_interval),
            reply.generation.updates,
        )
    outcomes = await while_connected(http.receive, collect(reply.generation))
    return JSON(_completion(reply, outcomes))


def _check_count(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_SEQUENCES:
        raise RequestError(
            f"{num_prompts} prompts with n = {n} are {num_prompts * n} sequences; "
            f"the limit is {MAX_SEQUENCES}",
            param="n",
        )


def _params(body: CompletionRequest, state: ServerState) -> SamplingParams:
    _, _, text = state.loaded()
    given: dict[str, Any] = {}
    if body.max_tokens is not None:
        given["max_tokens"] = max(body.max_tokens, 1) if body.echo else body.max_tokens
    elif "max_tokens" not in text.defaults:
        given["max_tokens"] = DEFAULT_MAX_TOKENS
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        counts = (body.logprobs, prompt_logprobs or 0)
        prompt_logprobs = ALL_LOGPROBS if ALL_LOGPROBS in counts else max(counts)
    return sampling_params(
        body, text.defaults, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs, **given
    )


def _build(
    body: CompletionRequest,
    prompts: Sequence[str | list[int]],
    params: SamplingParams,
    request_id: str,
    state: ServerState,
    *,
    priority: int,
    arrival_s: float,
) -> list[list[Request]]:
    """Returns the samples' requests for each prompt."""
    _, info, text = state.loaded()
    read = prompt_reader(body, params.max_tokens, text.tokenizer, info)
    requests = []
    for number, prompt in enumerate(prompts):
        samples = build_requests(
            f"{request_id}-{number}",
            read(prompt),
            params,
            tokenizer=text.tokenizer,
            info=info,
            add_special_tokens=body.add_special_tokens is not False,
            priority=priority,
            cache_salt=body.cache_salt or "",
            arrival_s=arrival_s,
        )
        requests.append(_each_with_prompt(samples) if body.echo and body.stream else samples)
    return requests


def _each_with_prompt(samples: Sequence[Request]) -> list[Request]:
    """Returns the samples, each to bring the prompt's logprobs: a stream echoes them in each."""
    count = samples[0].params.prompt_logprobs
    return [
        dataclasses.replace(
            sample, params=dataclasses.replace(sample.params, prompt_logprobs=count)
        )
        for sample in samples
    ]


def _prompt_texts(
    body: CompletionRequest,
    prompts: Sequence[str | list[int]],
    requests: Sequence[Sequence[Request]],  # what has become of them
    tokenizer: Tokenizer,
) -> list[str]:
    if body.truncate_prompt_tokens is not None:
        return [tokenizer.decode(samples[0].prompt_tokens) for samples in requests]
    return [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]


def _completion(reply: _Reply, outcomes: Sequence[Outcome]) -> Completion:
    return Completion(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        choices=[_choice(reply, outcome) for outcome in outcomes],
        usage=reply.generation.usage,
    )


def _choice(reply: _Reply, outcome: Outcome) -> CompletionChoice:
    body, sample = reply.body, outcome.sample
    prompt_text = reply.prompt_texts[sample.prompt] if body.echo else ""
    return CompletionChoice(
        index=sample.index,
        text=prompt_text + outcome.text,
        logprobs=_logprobs(reply, sample, outcome.logprobs, outcome.prompt_logprobs),
        finish_reason=outcome.last.finish_reason,
        stop_reason=outcome.last.stop_reason,
        token_ids=outcome.tokens if body.return_token_ids else None,
        prompt_logprobs=prompt_logprobs_body(outcome.prompt_logprobs, body.prompt_logprobs),
        prompt_token_ids=list(sample.prompt_tokens) if body.return_token_ids else None,
    )


def _logprobs(
    reply: _Reply,
    sample: Sample,
    positions: Sequence[PositionLogprobs],
    prompt: Sequence[PositionLogprobs | None] | None,  # for echo; its first position has none
) -> CompletionLogprobs | None:
    body = reply.body
    if body.logprobs is None:
        return None
    as_ids = bool(body.return_tokens_as_token_ids)
    result = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    shift = len(reply.prompt_texts[sample.prompt]) if body.echo else 0
    if body.echo and prompt is not None:
        first = reply.tokenizer.token_text(sample.prompt_tokens[0])
        result.tokens.append(f"token_id:{sample.prompt_tokens[0]}" if as_ids else first)
        result.text_offset.append(0)
        result.token_logprobs.append(None)
        result.top_logprobs.append(None)
    echoed = [(0, position) for position in prompt or () if position] if body.echo else []
    generated = [(shift, position) for position in positions]
    for start_char, position in (*echoed, *generated):
        entries = (position.chosen, *shown(position.top, body, body.logprobs))
        result.tokens.append(token_name(position.chosen, as_ids))
        result.text_offset.append(start_char + position.offset)
        result.token_logprobs.append(finite(position.chosen.logprob))
        # The chosen token comes first and may be among the likeliest, too.
        top = {token_name(entry, as_ids): finite(entry.logprob) for entry in reversed(entries)}
        result.top_logprobs.append(dict(reversed(top.items())))
    return result


def _writer(reply: _Reply, chunks: ChunkWriter) -> Callable[[Sample, Delta], bytes]:
    """Returns what writes a delta's event, or nothing if there is nothing to say."""
    body = reply.body

    def write(sample: Sample, delta: Delta) -> bytes:
        is_first, sample.is_started = not sample.is_started, True
        has_more = delta.finish_reason is not None or delta.logprobs is not None
        if not has_more and not body.return_token_ids and not (is_first and body.echo):
            return chunks.plain(sample.index, delta.text) if delta.text else b""
        text = delta.text
        if is_first and body.echo:
            text = reply.prompt_texts[sample.prompt] + text
        fields: dict[str, Any] = {
            "logprobs": _logprobs(reply, sample, delta.logprobs or (), delta.prompt_logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.return_token_ids:
            fields["token_ids"] = delta.tokens
            if is_first:
                fields["prompt_token_ids"] = sample.prompt_tokens
        return chunks.full(sample.index, text, fields)

    return write


def _chunk_writer(reply: _Reply) -> ChunkWriter:
    return ChunkWriter(
        reply.generation,
        reply.stream_options,
        reply_id=reply.id,
        created=reply.created,
        model=reply.model,
        kind="text_completion",
        text_start=b',"text":',
        text_end=b"",
        interval=reply.stream_interval,
    )
