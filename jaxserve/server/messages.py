"""/v1/messages: Anthropic's protocol."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import EngineStopped
from jaxserve.generation import Delta
from jaxserve.server.body import read_body
from jaxserve.server.conversation import Conversation, converse, count_tokens
from jaxserve.server.events import JSON, Event, EventStream, while_connected
from jaxserve.server.generate import arrival, params_named
from jaxserve.server.message_errors import message_error_body
from jaxserve.server.message_input import PARAM_NAMES, chat_request
from jaxserve.server.message_writer import MessageWriter
from jaxserve.server.pacing import kept_alive
from jaxserve.server.protocol.messages import (
    CountRequest,
    Message,
    MessageRequest,
    MessageUsage,
    OutputTokensDetails,
)
from jaxserve.server.state import ServerState
from jaxserve.text.message import Said

_decoder = msgspec.json.Decoder(MessageRequest)
_count_decoder = msgspec.json.Decoder(CountRequest)


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """An `EventWriter` of one reply."""

    max_tokens: int
    conversation: Conversation
    writer: MessageWriter

    def start(self) -> list[Event]:
        return self.writer.start()

    def add(self, said: Said, delta: Delta) -> list[Event]:
        del delta
        return self.writer.add(said)

    def finish(self, delta: Delta) -> list[Event]:
        return self.writer.finish(*self._stop(delta), usage_of(self.conversation))

    def fail(self, error: EngineStopped) -> list[Event]:
        return [message_error_body(error)]

    def _stop(self, delta: Delta) -> tuple[str, str | None]:
        """Returns Anthropic's stop_reason and stop_sequence."""
        if delta.finish_reason == "length":
            num_tokens = self.conversation.generation.usage.completion_tokens
            is_context_full = num_tokens < self.max_tokens
            return "model_context_window_exceeded" if is_context_full else "max_tokens", None
        if isinstance(delta.stop_reason, str):
            return "stop_sequence", delta.stop_reason
        return "tool_use" if self.writer.has_tool_use else "end_turn", None


def usage_of(conversation: Conversation) -> MessageUsage:
    """Returns what has been computed so far."""
    generation = conversation.generation
    usage, num_cached = generation.usage, generation.num_cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - num_cached,
        cache_read_input_tokens=num_cached,
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(
            thinking_tokens=conversation.reading.num_reasoning()
        ),
    )


async def create_message(http: HttpRequest) -> Response:
    """Returns an answer to the conversation, or a stream of its events."""
    state: ServerState = http.app.state.server
    body = await read_body(http, _decoder)
    body.check()
    model = state.model_name_for(body.model)
    with params_named(PARAM_NAMES):
        chat = chat_request(body)
        reply_id, arrival_s = arrival(http, chat, "msg_")
        conversation = await converse(http, chat, reply_id=reply_id, arrival_s=arrival_s)
    message = Message(id=reply_id, model=model, content=[], usage=usage_of(conversation))
    reply = _Reply(
        max_tokens=body.max_tokens, conversation=conversation, writer=MessageWriter(message)
    )
    if body.stream:
        frames = kept_alive(conversation.frames(reply), state.config.sse_keep_alive_interval)
        return EventStream(frames, conversation.generation.updates)
    await while_connected(http.receive, conversation.run(reply))
    return JSON(reply.writer.message)


async def count_message_tokens(http: HttpRequest) -> Response:
    """Returns how many tokens the conversation's prompt has."""
    state: ServerState = http.app.state.server
    body = await read_body(http, _count_decoder)
    body.check()
    state.model_name_for(body.model)
    with params_named(PARAM_NAMES):
        num_tokens = await count_tokens(chat_request(body), state)
    return JSON({"input_tokens": num_tokens})
