"""/v1/responses: OpenAI's Responses protocol, and the responses that are kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from jaxserve.engine.request import SamplingParams
from jaxserve.errors import EngineStopped, RequestError
from jaxserve.generation import Delta
from jaxserve.server.body import read_body
from jaxserve.server.chat import logprobs_of
from jaxserve.server.content_logprobs import ContentLogprobs
from jaxserve.server.conversation import Conversation, converse
from jaxserve.server.events import JSON, Event, EventStream, error_body, while_connected
from jaxserve.server.generate import arrival, params_named
from jaxserve.server.pacing import kept_alive
from jaxserve.server.protocol.chat import ChatRequest, TokenLogprob
from jaxserve.server.protocol.responses import (
    INCLUDE_REASONING,
    InputDetails,
    InputItem,
    OutputDetails,
    Response,
    ResponseRequest,
    ResponseUsage,
    TextOptions,
)
from jaxserve.server.response_input import (
    PARAM_NAMES,
    chat_request,
    echoed_choice,
    echoed_tools,
    items_of,
)
from jaxserve.server.response_store import ResponseStore, StoredResponse
from jaxserve.server.response_writer import ResponseWriter, new_id
from jaxserve.server.state import ServerState
from jaxserve.text.message import Said

_decoder = msgspec.json.Decoder(ResponseRequest)
_items_decoder = msgspec.json.Decoder(list[InputItem])


@dataclass(frozen=True, kw_only=True)
class _Reply:
    """An `EventWriter` of one reply, which is stored at its end."""

    items: Sequence[InputItem]  # the conversation so far
    chat: ChatRequest
    conversation: Conversation
    writer: ResponseWriter
    store: ResponseStore
    logprobs: ContentLogprobs

    def start(self) -> list[Event]:
        return self.writer.start()

    def add(self, said: Said, delta: Delta) -> list[Event]:
        return self.writer.add(said, self._logprobs(delta))

    def finish(self, delta: Delta) -> list[Event]:
        assert delta.finish_reason is not None
        events = self.writer.finish(delta.finish_reason, self._usage())
        self._keep()
        return events

    def fail(self, error: EngineStopped) -> list[Event]:
        return self.writer.fail(error_body(error)["message"])

    def _logprobs(self, delta: Delta) -> list[TokenLogprob]:
        if delta.logprobs is None:
            return []
        logprobs = logprobs_of(self.chat, self.logprobs.push(delta.logprobs))
        return logprobs.content if logprobs is not None else []

    def _usage(self) -> ResponseUsage:
        generation = self.conversation.generation
        usage = generation.usage
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=generation.num_cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(
                reasoning_tokens=self.conversation.reading.num_reasoning()
            ),
            total_tokens=usage.total_tokens,
        )

    def _keep(self) -> None:
        response = self.writer.response
        if response.store:
            output = _items_decoder.decode(orjson.dumps(response.output))
            items = msgspec.json.encode([*self.items, *output])
            stored = StoredResponse(response=orjson.dumps(response), items=items)
            self.store.put(response.id, stored)


async def create_response(http: HttpRequest) -> HttpResponse:
    """Returns an answer to the input, or a stream of typed events."""
    state: ServerState = http.app.state.server
    store: ResponseStore = http.app.state.responses
    body = await read_body(http, _decoder)
    body.check()
    model = state.model_name_for(body.model)
    if body.store and not store.is_on:
        raise RequestError(
            "store is true; this server stores no responses (max_stored_responses is 0)",
            param="store",
        )
    items = items_of(body.input)
    if body.previous_response_id is not None:
        earlier = store.get(body.previous_response_id, "previous_response_id")
        items = [*_items_decoder.decode(earlier.items), *items]
    with params_named(PARAM_NAMES):
        chat = chat_request(body, items)
        request_id, arrival_s = arrival(http, chat, "resp_")
        conversation = await converse(
            http,
            chat,
            reply_id=request_id,
            arrival_s=arrival_s,
            cuts=body.truncation == "auto",
        )
    response = _new_response(body, model, conversation.params, store)
    reply = _Reply(
        items=items,
        chat=chat,
        conversation=conversation,
        writer=ResponseWriter(response, packs_reasoning=INCLUDE_REASONING in (body.include or ())),
        store=store,
        logprobs=ContentLogprobs(conversation.reading.readers[0]),
    )
    if body.stream:
        frames = kept_alive(conversation.frames(reply), state.config.sse_keep_alive_interval)
        return EventStream(frames, conversation.generation.updates)
    await while_connected(http.receive, conversation.run(reply))
    return JSON(reply.writer.response)


def _new_response(
    body: ResponseRequest, model: str, params: SamplingParams, store: ResponseStore
) -> Response:
    """Returns the response before its first token."""
    text, reasoning = body.text or TextOptions(), body.reasoning
    return Response(
        id=new_id("resp"),  # never the client's: whoever knows it can read the response
        created_at=int(time.time()),
        status="in_progress",
        model=model,
        output=[],
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": reasoning.effort if reasoning else None, "summary": None},
        safety_identifier=body.safety_identifier,
        store=store.is_on and body.store is not False,
        temperature=params.temperature,
        text={"format": text.format or {"type": "text"}, "verbosity": "medium"},
        tool_choice=echoed_choice(body.tool_choice),
        tools=echoed_tools(body.tools),
        top_logprobs=body.top_logprobs or 0,
        top_p=params.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )


async def get_response(http: HttpRequest) -> HttpResponse:
    """Returns a stored response."""
    store: ResponseStore = http.app.state.responses
    stored = store.get(http.path_params["response_id"], "response_id")
    for name in ("stream", "starting_after"):
        if http.query_params.get(name, "false").lower() not in ("false", "0", ""):
            raise RequestError(
                f"{name} is for background responses, which this server has none of", param=name
            )
    return HttpResponse(stored.response, media_type="application/json")


async def cancel_response(http: HttpRequest) -> HttpResponse:
    """Refuses: what is stored is finished, and a stream is cancelled by closing it."""
    store: ResponseStore = http.app.state.responses
    response_id = http.path_params["response_id"]
    store.get(response_id, "response_id")
    raise RequestError(
        f"{response_id[:200]!r} is no background response; only those can be cancelled",
        param="response_id",
    )


async def delete_response(http: HttpRequest) -> HttpResponse:
    """Forgets a stored response."""
    store: ResponseStore = http.app.state.responses
    response_id = http.path_params["response_id"]
    store.delete(response_id, "response_id")
    return JSON({"id": response_id, "object": "response", "deleted": True})
