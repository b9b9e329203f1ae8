"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.engine.request import Request, SamplingParams
from jaxserve.errors import PromptTooLong, RequestError
from jaxserve.generation import Delta, PositionLogprobs, TokenText, build_requests
from jaxserve.server.body import read_body
from jaxserve.server.chunks import ChunkWriter
from jaxserve.server.events import JSON, EventStream, while_connected
from jaxserve.server.generate import (
    Generation,
    Outcome,
    Sample,
    arrival,
    check_length,
    collect,
    engine_id,
    finite,
    off_loop,
    params_named,
    prompt_logprobs_body,
    start,
    token_name,
)
from jaxserve.server.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    TokenLogprob,
    TopLogprob,
)
from jaxserve.server.protocol.common import sampling_params
from jaxserve.server.protocol.reasoning import template_variables
from jaxserve.server.protocol.tools import ToolUse, delta_body, message_body
from jaxserve.server.reading import Reading, constrained, reading_of, tool_use_of
from jaxserve.server.state import ServerState
from jaxserve.text.chat_template import encode_chat

_decoder = msgspec.json.Decoder(ChatRequest)


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """What every part of one reply needs."""

    id: str
    created: int
    model: str
    role: str
    body: ChatRequest
    generation: Generation
    reading: Reading


async def create_chat_completion(http: HttpRequest) -> Response:
    """Returns an answer to the conversation, or a stream of its chunks."""
    state: ServerState = http.app.state.server
    body = await read_body(http, _decoder)
    reply_id, arrival_s = arrival(http, body, "chatcmpl-")
    model = state.model_name_for(body.model)
    body.check()
    messages = body.conversation()
    _, _, text = state.loaded()
    use = tool_use_of(body, text)
    params = _params(body, use, state)
    requests, reading = await off_loop(
        partial(_build, body, messages, use, params, engine_id(reply_id), arrival_s, state),
        sum(_num_chars(message) for message in messages) + (0 if use is None else use.num_bytes),
    )
    has_reasoning = text.format.reasoning is not None
    is_new_message = body.add_generation_prompt is not False
    reply = _Reply(
        id=reply_id,
        created=int(time.time()),
        model=model,
        role=state.config.response_role if is_new_message else messages[-1]["role"],
        body=body,
        generation=await start(
            state, [requests], num_reasoning=reading.num_reasoning if has_reasoning else None
        ),
        reading=reading,
    )
    if body.stream:
        chunks = _chunk_writer(reply)
        return EventStream(chunks.stream(_writer(reply, chunks)), reply.generation.updates)
    outcomes = await while_connected(http.receive, collect(reply.generation))
    return JSON(_completion(reply, outcomes))


def _params(body: ChatRequest, use: ToolUse | None, state: ServerState) -> SamplingParams:
    _, _, text = state.loaded()
    has_tools = use is not None and use.parsed is not None
    given: dict[str, Any] = {
        "max_tokens": text.defaults.get("max_tokens"),
        "shown_special_tokens": text.format.marks_for(has_tools=has_tools),
    }
    names = {"logprobs": "top_logprobs"}
    if body.max_completion_tokens is not None:
        given["max_tokens"] = body.max_completion_tokens
        names["max_tokens"] = "max_completion_tokens"
    elif body.max_tokens is not None:
        given["max_tokens"] = body.max_tokens
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    with params_named(names):
        return sampling_params(body, text.defaults, prompt_logprobs=body.prompt_logprobs, **given)


def _build(
    body: ChatRequest,
    messages: Sequence[dict[str, Any]],
    use: ToolUse | None,
    params: SamplingParams,
    request_id: str,
    arrival_s: float,
    state: ServerState,
) -> tuple[list[Request], Reading]:
    """Returns the requests of all samples, and how their answers are read."""
    _, info, text = state.loaded()
    if text.chat_template is None:
        raise RequestError("the model has no chat template; see --chat-template", param="messages")
    for message in messages:
        if isinstance(content := message.get("content"), str):
            check_length(content, text.tokenizer, info.max_model_len, "messages")
    prompt = encode_chat(
        text.chat_template,
        text.tokenizer,
        messages,
        tools=None if use is None else use.definitions,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=template_variables(
            body.reasoning_effort, body.chat_template_kwargs, text.chat_template.source
        ),
        add_special_tokens=bool(body.add_special_tokens),
    )
    tokens = prompt.tokens
    if len(tokens) >= info.max_model_len:
        raise PromptTooLong(len(tokens), info.max_model_len, param="messages")
    is_completion = body.max_completion_tokens is not None
    names = {"logprobs": "top_logprobs", "prompt": "messages"}
    with params_named(names | ({"max_tokens": "max_completion_tokens"} if is_completion else {})):
        requests = build_requests(
            request_id,
            tokens,
            params,
            tokenizer=text.tokenizer,
            info=info,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            arrival_s=arrival_s,
        )
    requests = constrained(requests, body, use, text, prompt.text)
    return requests, reading_of(body, use, text, prompt.text, len(requests))


def _num_chars(message: dict[str, Any]) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else ()
    return sum(len(str(part.get("text"))) for part in parts if isinstance(part, dict))


def _completion(reply: _Reply, outcomes: Sequence[Outcome]) -> ChatCompletion:
    body, first = reply.body, outcomes[0]
    # Before the usage: it counts what has been read.
    choices = [_choice(reply, outcome) for outcome in outcomes]
    return ChatCompletion(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        choices=choices,
        usage=reply.generation.usage,
        prompt_logprobs=prompt_logprobs_body(first.prompt_logprobs, body.prompt_logprobs),
        prompt_token_ids=list(first.sample.prompt_tokens) if body.return_token_ids else None,
    )


def _choice(reply: _Reply, outcome: Outcome) -> ChatChoice:
    index = outcome.sample.index
    said = reply.reading.read(index, outcome.text, outcome.offsets, final=True)
    return ChatChoice(
        index=index,
        message=message_body(reply.role, said),
        logprobs=_logprobs(reply, outcome.logprobs),
        finish_reason=reply.reading.finish_reason(index, outcome.last.finish_reason),
        stop_reason=outcome.last.stop_reason,
        token_ids=outcome.tokens if reply.body.return_token_ids else None,
    )


def _logprobs(reply: _Reply, positions: Sequence[PositionLogprobs]) -> ChatLogprobs | None:
    body = reply.body
    if not body.logprobs:
        return None
    as_ids = bool(body.return_tokens_as_token_ids)
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token_name(position.chosen, as_ids),
                logprob=finite(position.chosen.logprob),
                bytes=list(position.chosen.data),
                top_logprobs=[
                    _top_logprob(entry, as_ids) for entry in position.top[: body.top_logprobs or 0]
                ],
            )
            for position in positions
        ]
    )


def _top_logprob(entry: TokenText, as_ids: bool) -> TopLogprob:
    return TopLogprob(
        token=token_name(entry, as_ids), logprob=finite(entry.logprob), bytes=list(entry.data)
    )


def _chunk_writer(reply: _Reply) -> ChunkWriter:
    return ChunkWriter(
        reply.generation,
        reply.body.stream_options,
        reply_id=reply.id,
        created=reply.created,
        model=reply.model,
        kind="chat.completion.chunk",
        text_start=b',"delta":{"content":',
        text_end=b"}",
    )


def _writer(reply: _Reply, chunks: ChunkWriter) -> Callable[[Sample, Delta], bytes]:
    """Returns what writes a delta's events: the role's goes first, an empty one is left out."""
    body = reply.body
    role = {"delta": {"role": reply.role, "content": ""}, "logprobs": None, "finish_reason": None}

    def write_role(sample: Sample) -> bytes:
        outer = {"prompt_token_ids": sample.prompt_tokens} if body.return_token_ids else None
        return chunks.without_text(sample.index, role, outer)

    def write(sample: Sample, delta: Delta) -> bytes:
        first = b""
        if not sample.is_started:
            sample.is_started = True
            first = write_role(sample)
        has_more = delta.finish_reason is not None or delta.logprobs is not None
        said = reply.reading.read(
            sample.index, delta.text, delta.offsets, final=delta.finish_reason is not None
        )
        is_text = not said.calls and not said.reasoning
        if is_text and not has_more and not body.return_token_ids:
            return first + chunks.plain(sample.index, said.content) if said.content else first
        fields: dict[str, Any] = {
            "logprobs": _logprobs(reply, delta.logprobs or ()) if delta.logprobs else None,
            "finish_reason": reply.reading.finish_reason(sample.index, delta.finish_reason),
            "stop_reason": delta.stop_reason,
        }
        if body.return_token_ids:
            fields["token_ids"] = delta.tokens
        if is_text:
            return first + chunks.full(sample.index, said.content, fields)
        return first + chunks.without_text(sample.index, {"delta": delta_body(said)} | fields)

    return write
