"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.generation import Delta, PositionLogprobs, TokenText
from jaxserve.server.body import read_body
from jaxserve.server.chunks import ChunkWriter
from jaxserve.server.conversation import converse
from jaxserve.server.events import JSON, EventStream, while_connected
from jaxserve.server.generate import (
    Generation,
    Outcome,
    Sample,
    arrival,
    collect,
    finite,
    prompt_logprobs_body,
    shown,
    token_name,
)
from jaxserve.server.pacing import kept_alive
from jaxserve.server.protocol.chat import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    TokenLogprob,
    TopLogprob,
)
from jaxserve.server.protocol.common import StreamOptions, stream_options
from jaxserve.server.protocol.tools import delta_body, message_body
from jaxserve.server.reading import Reading
from jaxserve.server.state import ServerState
from jaxserve.text.chat_template import texts_of

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
    reading: Reading
    stream_interval: int = 1
    stream_options: StreamOptions = field(default_factory=StreamOptions)
    echoed: str = ""  # goes before each answer
    prompt_text: str | None = None  # where the client asked for it


async def create_chat_completion(http: HttpRequest) -> Response:
    """Returns an answer to the conversation, or a stream of its chunks."""
    state: ServerState = http.app.state.server
    body = await read_body(http, _decoder)
    reply_id, arrival_s = arrival(http, body, "chatcmpl-")
    model = state.model_name_for(body.model)
    conversation = await converse(http, body, reply_id=reply_id, arrival_s=arrival_s)
    role = role_of(body, state)  # of messages that have been rendered, and so are well-formed
    reply = Reply(
        id=reply_id,
        created=int(time.time()),
        model=model,
        role=role,
        echoed=_last_text(body.messages[-1], role) if body.echo else "",
        prompt_text=conversation.prompt_text if body.return_prompt_text else None,
        body=body,
        generation=conversation.generation,
        reading=conversation.reading,
        stream_interval=conversation.stream_interval,
        stream_options=stream_options(body, forces_usage=state.config.enable_force_include_usage),
    )
    if body.stream:
        chunks = _chunk_writer(reply)
        return EventStream(
            kept_alive(chunks.stream(_writer(reply, chunks)), state.config.sse_keep_alive_interval),
            reply.generation.updates,
        )
    outcomes = await while_connected(http.receive, collect(reply.generation))
    return JSON(completion(reply, outcomes))


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
    return "\n".join(texts_of(content, -1))


def completion(reply: Reply, outcomes: Sequence[Outcome]) -> ChatCompletion:
    """Returns the body of a reply that does not stream."""
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
        prompt_text=reply.prompt_text,
    )


def _choice(reply: Reply, outcome: Outcome) -> ChatChoice:
    index = outcome.sample.index
    said = reply.reading.read(index, outcome.text, outcome.offsets, final=True)
    said = said._replace(content=reply.echoed + said.content)
    return ChatChoice(
        index=index,
        message=message_body(reply.role, said),
        logprobs=logprobs_of(reply.body, outcome.logprobs),
        finish_reason=reply.reading.finish_reason(index, outcome.last.finish_reason),
        stop_reason=outcome.last.stop_reason,
        token_ids=outcome.tokens if reply.body.return_token_ids else None,
    )


def logprobs_of(body: ChatRequest, positions: Sequence[PositionLogprobs]) -> ChatLogprobs | None:
    """Returns the log-probabilities as a reply has them; None unless the client asked for them."""
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
        reply.stream_options,
        reply_id=reply.id,
        created=reply.created,
        model=reply.model,
        kind="chat.completion.chunk",
        text_start=b',"delta":{"content":',
        text_end=b"}",
        interval=reply.stream_interval,
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
        said = reply.reading.read(
            sample.index, delta.text, delta.offsets, final=delta.finish_reason is not None
        )
        is_text = not said.calls and not said.reasoning
        if is_text and not has_more and not body.return_token_ids:
            return first + chunks.plain(sample.index, said.content) if said.content else first
        fields: dict[str, Any] = {
            "logprobs": logprobs_of(body, delta.logprobs) if delta.logprobs else None,
            "finish_reason": reply.reading.finish_reason(sample.index, delta.finish_reason),
            "stop_reason": delta.stop_reason,
        }
        if body.return_token_ids:
            fields["token_ids"] = delta.tokens
        if is_text:
            return first + chunks.full(sample.index, said.content, fields)
        return first + chunks.without_text(sample.index, {"delta": delta_body(said)} | fields)

    return write
