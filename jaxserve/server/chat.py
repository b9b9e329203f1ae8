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
from jaxserve.errors import PromptTooLong
from jaxserve.generation import Delta, PositionLogprobs, TokenText, build_requests
from jaxserve.server.beams import beam_generation
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
    priority_of,
    prompt_logprobs_body,
    shown,
    start,
    token_name,
)
from jaxserve.server.pacing import kept_alive
from jaxserve.server.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    TokenLogprob,
    TopLogprob,
)
from jaxserve.server.protocol.common import sampling_params
from jaxserve.server.request_log import record_of
from jaxserve.server.state import ServerState
from jaxserve.server.templates import template_for
from jaxserve.server.truncation import truncation_for
from jaxserve.text.chat_template import encode_chat

_decoder = msgspec.json.Decoder(ChatRequest)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What every part of one reply needs."""

    id: str
    created: int
    model: str
    role: str
    body: ChatRequest
    generation: Generation
    stream_interval: int  # of streams whose request names none
    echoed: str = ""  # goes before each answer
    prompt_text: str | None = None  # where the client asked for it


async def create_chat_completion(http: HttpRequest) -> Response:
    """Returns an answer to the conversation, or a stream of its chunks."""
    state: ServerState = http.app.state.server
    body = await read_body(http, _decoder)
    reply_id, arrival_s = arrival(http, body, "chatcmpl-")
    model = state.model_name_for(body.model)
    body.check()
    messages = body.conversation()
    params = params_of(body, state)
    prompt_text, requests = await off_loop(
        partial(
            build,
            body,
            messages,
            params,
            engine_id(reply_id),
            state,
            priority=priority_of(http, body),
            arrival_s=arrival_s,
        ),
        sum(_num_chars(message) for message in messages),
        is_slow=body.chat_template is not None,  # waits for a process
    )
    role = role_of(body, state)
    reply = Reply(
        id=reply_id,
        created=int(time.time()),
        model=model,
        role=role,
        echoed=_last_text(messages[-1], role) if body.echo else "",
        prompt_text=prompt_text if body.return_prompt_text else None,
        body=body,
        generation=(
            beam_generation(state, body, [requests])
            if body.use_beam_search
            else await start(state, [requests])
        ),
        stream_interval=state.config.stream_interval,
    )
    record_of(http.scope).generation = reply.generation
    if body.stream:
        chunks = _chunk_writer(reply)
        return EventStream(
            kept_alive(chunks.stream(_writer(reply, chunks)), state.config.sse_keep_alive_interval),
            reply.generation.updates,
        )
    outcomes = await while_connected(http.receive, collect(reply.generation))
    return JSON(completion(reply, outcomes))


def params_of(body: ChatRequest, state: ServerState) -> SamplingParams:
    """Returns the sampling parameters, over the model's defaults. Raises `RequestError`."""
    _, _, text = state.loaded()
    given: dict[str, Any] = {"max_tokens": text.defaults.get("max_tokens")}
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


def build(
    body: ChatRequest,
    messages: Sequence[dict[str, Any]],
    params: SamplingParams,
    request_id: str,
    state: ServerState,
    *,
    priority: int,
    arrival_s: float,
) -> tuple[str, list[Request]]:
    """Returns the prompt's text and the requests of all samples."""
    _, info, text = state.loaded()
    truncation = truncation_for(body, params.max_tokens, info.max_model_len)
    for message in messages:
        if isinstance(content := message.get("content"), str) and truncation is None:
            check_length(content, text.tokenizer, info.max_model_len, "messages")
    prompt = encode_chat(
        template_for(body.chat_template, state),
        text.tokenizer,
        messages,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
        add_special_tokens=bool(body.add_special_tokens),
    )
    tokens = prompt.tokens if truncation is None else truncation.cut(prompt.tokens)
    if len(tokens) >= info.max_model_len:
        raise PromptTooLong(len(tokens), info.max_model_len, param="messages")
    is_completion = body.max_completion_tokens is not None
    names = {"logprobs": "top_logprobs", "prompt": "messages"}
    with params_named(names | ({"max_tokens": "max_completion_tokens"} if is_completion else {})):
        return prompt.text, build_requests(
            request_id,
            tokens,
            params,
            tokenizer=text.tokenizer,
            info=info,
            priority=priority,
            cache_salt=body.cache_salt or "",
            arrival_s=arrival_s,
        )


def role_of(body: ChatRequest, state: ServerState) -> str:
    """Returns the role of the answer: the last message's if that is continued."""
    if body.add_generation_prompt is not False:
        return state.config.response_role
    return str(body.messages[-1].get("role"))


def _last_text(message: dict[str, Any], role: str) -> str:
    """Returns the text of the last message, if it is by the one who answers."""
    if message.get("role") != role:
        return ""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part if isinstance(part, str) else part["text"] for part in content)


def _num_chars(message: dict[str, Any]) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else ()
    return sum(len(str(part.get("text"))) for part in parts if isinstance(part, dict))


def completion(reply: Reply, outcomes: Sequence[Outcome]) -> ChatCompletion:
    """Returns the body of a reply that does not stream."""
    body, first = reply.body, outcomes[0]
    return ChatCompletion(
        id=reply.id,
        created=reply.created,
        model=reply.model,
        choices=[
            ChatChoice(
                index=outcome.sample.index,
                message=ChatMessage(role=reply.role, content=reply.echoed + outcome.text),
                logprobs=_logprobs(reply, outcome.logprobs),
                finish_reason=outcome.last.finish_reason,
                stop_reason=outcome.last.stop_reason,
                token_ids=outcome.tokens if body.return_token_ids else None,
            )
            for outcome in outcomes
        ],
        usage=reply.generation.usage,
        prompt_logprobs=prompt_logprobs_body(first.prompt_logprobs, body.prompt_logprobs),
        prompt_token_ids=list(first.sample.prompt_tokens) if body.return_token_ids else None,
        prompt_text=reply.prompt_text,
    )


def _logprobs(reply: Reply, positions: Sequence[PositionLogprobs]) -> ChatLogprobs | None:
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
                    _top_logprob(entry, as_ids)
                    for entry in shown(position.top, body, body.top_logprobs or 0)
                ],
            )
            for position in positions
        ]
    )


def _top_logprob(entry: TokenText, as_ids: bool) -> TopLogprob:
    return TopLogprob(
        token=token_name(entry, as_ids), logprob=finite(entry.logprob), bytes=list(entry.data)
    )


def _chunk_writer(reply: Reply) -> ChunkWriter:
    return ChunkWriter(
        reply.generation,
        reply.body.stream_options,
        reply_id=reply.id,
        created=reply.created,
        model=reply.model,
        kind="chat.completion.chunk",
        text_start=b',"delta":{"content":',
        text_end=b"}",
        interval=reply.body.stream_interval or reply.stream_interval,
    )


def _writer(reply: Reply, chunks: ChunkWriter) -> Callable[[Sample, Delta], bytes]:
    """Returns what writes a delta's events: the role's goes first, an empty one is left out."""
    body = reply.body
    role = {"delta": {"role": reply.role, "content": ""}, "logprobs": None, "finish_reason": None}

    def write_role(sample: Sample) -> bytes:
        outer: dict[str, Any] = {}
        if body.return_token_ids:
            outer["prompt_token_ids"] = sample.prompt_tokens
        if reply.prompt_text is not None:
            outer["prompt_text"] = reply.prompt_text
        first = chunks.without_text(sample.index, role, outer)
        return first + chunks.plain(sample.index, reply.echoed) if reply.echoed else first

    def write(sample: Sample, delta: Delta) -> bytes:
        first = b""
        if not sample.is_started:
            sample.is_started = True
            first = write_role(sample)
        has_more = delta.finish_reason is not None or delta.logprobs is not None
        if not has_more and not body.return_token_ids:
            return first + chunks.plain(sample.index, delta.text) if delta.text else first
        fields: dict[str, Any] = {
            "logprobs": _logprobs(reply, delta.logprobs or ()) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.return_token_ids:
            fields["token_ids"] = delta.tokens
        return first + chunks.full(sample.index, delta.text, fields)

    return write
