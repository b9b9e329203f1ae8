"""The pipeline of every chat-like protocol: from a chat request to what the model says.

Chat, Responses and Messages share it. A protocol translates its request into a `ChatRequest`,
and writes its own replies and events from what is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest

from jaxserve.engine.info import EngineInfo
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.errors import EngineStopped, PromptTooLong
from jaxserve.generation import Delta, build_requests
from jaxserve.server.beams import admit
from jaxserve.server.cutting import build_cut
from jaxserve.server.events import Event, named_events
from jaxserve.server.generate import (
    MAX_INLINE_CHARS,
    Generation,
    check_length,
    engine_id,
    off_loop,
    params_named,
    priority_of,
)
from jaxserve.server.pacing import Pacer
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.protocol.common import sampling_params
from jaxserve.server.protocol.reasoning import template_variables
from jaxserve.server.protocol.tools import ToolUse
from jaxserve.server.reading import Reading, constrained, reading_of, tool_use_of
from jaxserve.server.request_log import record_of
from jaxserve.server.state import ServerState
from jaxserve.server.templates import template_for
from jaxserve.server.truncation import truncation_for
from jaxserve.text.chat_template import encode_chat
from jaxserve.text.message import Said
from jaxserve.text.tokenizer import Tokenizer

ROOM_SHARE = 4  # one part in so many of the context is left for the answer to a cut conversation


class EventWriter(Protocol):
    """Writes the typed events of a protocol, and keeps what they add up to."""

    def start(self) -> list[Event]:
        """Returns the events before the first token."""

    def add(self, said: Said, delta: Delta) -> list[Event]:
        """Returns the events of what has been said."""

    def finish(self, delta: Delta) -> list[Event]:
        """Returns the last events; `delta` says why the answer ended."""

    def fail(self, error: EngineStopped) -> list[Event]:
        """Returns the events of an engine that has stopped."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation whose answers are under way."""

    generation: Generation
    reading: Reading
    params: SamplingParams  # with the model's defaults filled in
    prompt_text: str
    stream_interval: int  # tokens to a delta of the answer

    async def answer(self) -> AsyncGenerator[tuple[Said, Delta]]:
        """Yields what the only sample says, and the delta that it came with.

        Raises `EngineStopped` if the engine dies.
        """
        pacer = Pacer(self.stream_interval)
        async with contextlib.aclosing(self.generation.deltas()) as deltas:
            async for news in deltas:
                for sample, delta in pacer.pass_on(news):
                    is_last = delta.finish_reason is not None
                    said = self.reading.read(sample.index, delta.text, delta.offsets, final=is_last)
                    yield said, delta

    async def events(self, writer: EventWriter) -> AsyncGenerator[list[Event]]:
        """Yields the events of the answer, some at a time. Raises as `answer` does."""
        yield writer.start()
        async with contextlib.aclosing(self.answer()) as answer:
            async for said, delta in answer:
                events = writer.add(said, delta)
                if delta.finish_reason is not None:
                    events += writer.finish(delta)
                if events:
                    yield events

    async def frames(self, writer: EventWriter) -> AsyncGenerator[bytes]:
        """Yields the events of a stream; an engine failure is the last of them."""
        try:
            async with contextlib.aclosing(self.events(writer)) as steps:
                async for events in steps:
                    yield named_events(events)
        except EngineStopped as error:
            yield named_events(writer.fail(error))

    async def run(self, writer: EventWriter) -> None:
        """Lets the writer see all of the answer; aborts it when it is cancelled."""
        async with self.generation.updates, contextlib.aclosing(self.events(writer)) as steps:
            async for _ in steps:
                pass


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a conversation is made into."""

    text: str
    requests: list[Request]  # one for each sample
    reading: Reading  # of their answers


async def converse(
    http: HttpRequest,
    body: ChatRequest,
    *,
    reply_id: str,
    arrival_s: float,
    cuts: bool = False,  # drop the oldest turns of a conversation that is too long
) -> Conversation:
    """Returns the conversation once the engine has admitted it. Raises `RequestError`."""
    state: ServerState = http.app.state.server
    prompt, params = await _prepare(
        body,
        state,
        request_id=engine_id(reply_id),
        priority=priority_of(http, body),
        arrival_s=arrival_s,
        cuts=cuts,
    )
    _, _, text = state.loaded()
    num_reasoning = prompt.reading.num_reasoning if text.format.reasoning is not None else None
    generation = await admit(state, body, [prompt.requests], num_reasoning=num_reasoning)
    record_of(http.scope).generation = generation
    return Conversation(
        generation=generation,
        reading=prompt.reading,
        params=params,
        prompt_text=prompt.text,
        stream_interval=body.stream_interval or state.config.stream_interval,
    )


async def count_tokens(body: ChatRequest, state: ServerState) -> int:
    """Returns how many tokens the prompt of a conversation has. Raises `RequestError`."""
    prompt, _ = await _prepare(body, state, request_id="count")
    return len(prompt.requests[0].prompt_tokens)


async def _prepare(
    body: ChatRequest,
    state: ServerState,
    *,
    request_id: str,
    priority: int = 0,
    arrival_s: float = 0.0,
    cuts: bool = False,
) -> tuple[Prompt, SamplingParams]:
    body.check()
    messages = body.conversation()
    _, _, text = state.loaded()
    use = tool_use_of(body, text)
    params = params_of(body, use, state)
    work = prompt_of = partial(
        build, body, use, params, request_id, state, priority=priority, arrival_s=arrival_s
    )
    if cuts:
        work = partial(build_cut, prompt_of, fits=partial(_leaves_room, params, state))
    tools = None if use is None else use.definitions
    num_chars = _num_chars(messages, tools, body.documents, body.chat_template_kwargs)
    is_slow = body.chat_template is not None  # waits for a process
    return await off_loop(partial(work, messages), num_chars, is_slow=is_slow), params


def _leaves_room(params: SamplingParams, state: ServerState, prompt: Prompt) -> bool:
    _, info, _ = state.loaded()
    room = info.max_model_len // ROOM_SHARE
    if params.max_tokens is not None:
        room = min(room, params.max_tokens)
    return len(prompt.requests[0].prompt_tokens) <= info.max_model_len - room


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


def build(
    body: ChatRequest,
    use: ToolUse | None,
    params: SamplingParams,
    request_id: str,
    state: ServerState,
    messages: Sequence[dict[str, Any]],
    *,
    priority: int,
    arrival_s: float,
) -> Prompt:
    """Returns the prompt of `messages`, which may be some of the body's."""
    _, info, text = state.loaded()
    truncation = truncation_for(body, params.max_tokens, info.max_model_len)
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
        check=None if truncation is not None else partial(_check_length, text.tokenizer, info),
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
    requests = constrained(requests, body, use, text, prompt.text)
    reading = reading_of(body, use, text, prompt.text, len(requests))
    return Prompt(text=prompt.text, requests=requests, reading=reading)


def _check_length(tokenizer: Tokenizer, info: EngineInfo, text: str) -> None:
    check_length(text, tokenizer, info.max_model_len, "messages")


def _num_chars(*values: Any) -> int:
    """Returns the characters of all that a template may write, or enough of them to be many."""
    count, waiting = 0, list(values)
    while waiting and count <= MAX_INLINE_CHARS:
        value = waiting.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
        else:
            count += 1
    return count
