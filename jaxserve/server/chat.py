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
    ChatRequest,
    TokenLogprob,
    TopLogprob,
)
from jaxserve.server.protocol.common import sampling_params
from jaxserve.server.protocol.reasoning import template_variables
from jaxserve.server.protocol.tools import ToolUse, delta_body, message_body
from jaxserve.server.reading import Reading, constrained, reading_of, tool_use_of
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
    reading: Reading
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
    _, _, text = state.loaded()
    use = tool_use_of(body, text)
    params = params_of(body, use, state)
    prepared = await off_loop(
        partial(
            build,
            body,
            messages,
            use,
            params,
            engine_id(reply_id),
            state,
            priority=priority_of(http, body),
            arrival_s=arrival_s,
        ),
        sum(_num_chars(message) for message in messages) + (0 if use is None else use.num_bytes),
        is_slow=body.chat_template is not None,  # waits for a process
    )
    role = role_of(body, state)
    requests, reading = prepared.requests, prepared.reading
    num_reasoning = reading.num_reasoning if text.format.reasoning is not None else None
    reply = Reply(
        id=reply_id,
        created=int(time.time()),
        model=model,
        role=role,
        echoed=_last_text(messages[-1], role) if body.echo else "",
        prompt_text=prepared.prompt_text if body.return_prompt_text else None,
        body=body,
        generation=(
            beam_generation(state, body, [requests], num_reasoning=num_reasoning)
            if body.use_beam_search
            else await start(state, [requests], num_reasoning=num_reasoning)
        ),
        reading=reading,
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


def params_of(body: ChatRequest, use: ToolUse | None, state: ServerState) -> SamplingParams:
    """Returns the sampling parameters, over the model's defaults. Raises `RequestError`."""
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


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A conversation on its way to the engine."""

    prompt_text: str
    requests: list[Request]  # of all samples
    reading: Reading


def build(
    body: ChatRequest,
    messages: Sequence[dict[str, Any]],
    use: ToolUse | None,
    params: SamplingParams,
    request_id: str,
    state: ServerState,
    *,
    priority: int,
    arrival_s: float,
) -> Prepared:
    """Returns a conversation as prompt and requests, and how its answers are read."""
    _, info, text = state.loaded()
    truncation = truncation_for(body, params.max_tokens, info.max_model_len)
    for message in messages:
        if isinstance(content := message.get("content"), str) and truncation is None:
            check_length(content, text.tokenizer, info.max_model_len, "messages")
    template = template_for(body.chat_template, state)
    prompt = encode_chat(
        template,
        text.tokenizer,
        messages,
        tools=None if use is None else use.definitions,
        documents=body.documents,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=template_variables(
            body.reasoning_effort, body.chat_template_kwargs, template.source
        ),
        add_special_tokens=bool(body.add_special_tokens),
    )
    tokens = prompt.tokens if truncation is None else truncation.cut(prompt.tokens)
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
            priority=priority,
            cache_salt=body.cache_salt or "",
            arrival_s=arrival_s,
        )
    return Prepared(
        prompt_text=prompt.text,
        requests=constrained(requests, body, use, text, prompt.text),
        reading=reading_of(body, use, text, prompt.text, len(requests)),
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
    return ChatChoice(
        index=index,
        message=message_body(reply.role, said._replace(content=reply.echoed + said.content)),
        logprobs=_logprobs(reply, outcome.logprobs),
        finish_reason=reply.reading.finish_reason(index, outcome.last.finish_reason),
        stop_reason=outcome.last.stop_reason,
        token_ids=outcome.tokens if reply.body.return_token_ids else None,
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
