"""POST /v1/chat/completions/batch: several conversations in one request, one answer to each."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.server.body import read_body
from jaxserve.server.chat import Reply, completion, role_of
from jaxserve.server.conversation import Prompt, build, params_of
from jaxserve.server.events import JSON, while_connected
from jaxserve.server.generate import arrival, collect, engine_id, priority_of, start
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.protocol.completions import MAX_PROMPTS
from jaxserve.server.reading import Reading
from jaxserve.server.request_log import record_of
from jaxserve.server.state import ServerState

# What belongs to one conversation, or to a stream; with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "stream": (None, False),
    "n": (None, 1),
    "use_beam_search": (None, False),
    "echo": (None, False),
    "tools": (None,),
    "tool_choice": (None, "none"),
    "parallel_tool_calls": (None,),
    "prompt_logprobs": (None,),
    "return_prompt_text": (None, False),
}


class ChatBatchRequest(ChatRequest, kw_only=True):
    """The body: a chat request whose `messages` is a list of conversations."""

    messages: list[list[dict[str, Any]]]  # type: ignore[assignment]

    def conversations(self) -> list[ChatRequest]:
        """Returns a request for each conversation. Raises `RequestError` naming what is wrong."""
        if not 1 <= len(self.messages) <= MAX_PROMPTS:
            raise RequestError(
                f"messages has {len(self.messages)} conversations; it takes 1 to {MAX_PROMPTS}",
                param="messages",
            )
        for name, neutral in _REFUSED.items():
            if getattr(self, name) not in neutral:
                raise RequestError(f"{name} does not go with a batch", param=name)
        fields = {name: getattr(self, name) for name in ChatRequest.__struct_fields__}
        return [ChatRequest(**{**fields, "messages": messages}) for messages in self.messages]


_decoder = msgspec.json.Decoder(ChatBatchRequest)


async def create_chat_batch(http: HttpRequest) -> Response:
    """Returns one choice for each conversation, `index` saying which."""
    state: ServerState = http.app.state.server
    body = await read_body(http, _decoder)
    reply_id, arrival_s = arrival(http, body, "chatcmpl-")
    model = state.model_name_for(body.model)
    bodies = body.conversations()
    for conversation in bodies:
        conversation.check()
        conversation.conversation()
    prompts = await asyncio.to_thread(
        partial(
            _build,
            bodies,
            engine_id(reply_id),
            state,
            priority=priority_of(http, body),
            arrival_s=arrival_s,
        )
    )
    _, _, text = state.loaded()
    readers = [reader for prompt in prompts for reader in prompt.reading.readers]
    reading = Reading(use=None, readers=readers)
    generation = await start(
        state,
        [prompt.requests for prompt in prompts],
        num_reasoning=reading.num_reasoning if text.format.reasoning is not None else None,
    )
    record_of(http.scope).generation = generation
    outcomes = await while_connected(http.receive, collect(generation))
    created = int(time.time())
    replies = [
        completion(
            Reply(
                id=reply_id,
                created=created,
                model=model,
                role=role_of(conversation, state),
                body=conversation,
                generation=generation,
                reading=reading,
            ),
            [outcome],
        )
        for conversation, outcome in zip(bodies, outcomes, strict=True)
    ]
    choices = [reply.choices[0] for reply in replies]
    return JSON(
        dataclasses.replace(
            replies[0], choices=choices, usage=generation.usage, prompt_token_ids=None
        )
    )


def _build(
    bodies: Sequence[ChatRequest],
    request_id: str,
    state: ServerState,
    *,
    priority: int,
    arrival_s: float,
) -> list[Prompt]:
    return [
        build(
            body,
            None,
            params_of(body, None, state),
            f"{request_id}-{number}",
            state,
            body.messages,
            priority=priority,
            arrival_s=arrival_s,
        )
        for number, body in enumerate(bodies)
    ]
