"""The chat pipeline for protocols that are not chat's: one conversation, one answer.

A protocol translates its request into a `ChatRequest`, and writes its own events of what is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxserve.engine.request import Request, SamplingParams
from jaxserve.errors import PromptTooLong
from jaxserve.generation import Delta
from jaxserve.server.chat import build, params_of
from jaxserve.server.generate import Generation, engine_id, off_loop, start
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.state import ServerState
from jaxserve.text.message import Said

MIN_ROOM = 4  # a conversation that is cut leaves this part of the context for the answer


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation whose answer is under way."""

    generation: Generation
    params: SamplingParams  # with the model's defaults filled in

    async def answer(self) -> AsyncGenerator[tuple[Said, Delta]]:
        """Yields what is said, and the delta it came with. Raises `EngineStopped`."""
        async with contextlib.aclosing(self.generation.deltas()) as deltas:
            async for news in deltas:
                for _, delta in news:
                    yield Said(content=delta.text), delta


async def converse(
    body: ChatRequest,
    state: ServerState,
    *,
    reply_id: str,
    arrival_s: float,
    cuts: bool = False,  # drop the oldest turns of a conversation that is too long
) -> Conversation:
    """Returns the conversation once the engine has admitted it. Raises `RequestError`."""
    body.check()
    messages = body.conversation()
    params = params_of(body, state)
    work = partial(_build_cut if cuts else build, body, messages, params)
    requests = await off_loop(
        partial(work, engine_id(reply_id), arrival_s, state), _num_chars(messages)
    )
    return Conversation(generation=await start(state, [requests]), params=params)


async def count_tokens(body: ChatRequest, state: ServerState) -> int:
    """Returns how many tokens the prompt of a conversation has. Raises `RequestError`."""
    body.check()
    messages = body.conversation()
    params = params_of(body, state)
    work = partial(build, body, messages, params, "count", 0.0, state)
    (request,) = await off_loop(work, _num_chars(messages))
    return len(request.prompt_tokens)


def _num_chars(messages: Sequence[dict[str, Any]]) -> int:
    return sum(len(message.get("content") or "") for message in messages)


def _build_cut(
    body: ChatRequest,
    messages: Sequence[dict[str, Any]],
    params: SamplingParams,
    request_id: str,
    arrival_s: float,
    state: ServerState,
) -> list[Request]:
    """Returns the requests of the longest end of the conversation that fits.

    The instructions stay, and what is dropped are whole turns, from one of the user's messages to
    the next. Raises `PromptTooLong` if the last turn alone does not fit.
    """
    _, info, _ = state.loaded()
    try:
        return build(body, messages, params, request_id, arrival_s, state)
    except PromptTooLong:
        room = min(params.max_tokens or info.max_model_len, info.max_model_len // MIN_ROOM)
    head, starts = _turns(messages)

    def attempt(start: int) -> list[Request] | PromptTooLong:
        try:
            part = [*messages[:head], *messages[start:]]
            requests = build(body, part, params, request_id, arrival_s, state)
        except PromptTooLong as error:
            return error
        num_tokens = len(requests[0].prompt_tokens)
        if num_tokens <= info.max_model_len - room:
            return requests
        return PromptTooLong(num_tokens + room, info.max_model_len, param="messages")

    # Fewer turns are never longer, so halving finds the first cut that fits.
    best = attempt(starts[-1])
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        found = attempt(starts[middle])
        if isinstance(found, PromptTooLong):
            low = middle + 1
        else:
            best, high = found, middle
    if isinstance(best, PromptTooLong):
        raise best
    return best


def _turns(messages: Sequence[dict[str, Any]]) -> tuple[int, list[int]]:
    """Returns how many messages instruct, and where the turns after them begin."""
    roles = [message["role"] for message in messages]
    head = next(
        (index for index, role in enumerate(roles) if role not in ("system", "developer")), 0
    )
    starts = [index for index, role in enumerate(roles) if role == "user" and index >= head]
    return head, starts or [head]
