"""POST /invocations, SageMaker's one door: the body says which endpoint it is for."""

from __future__ import annotations

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.server.body import read_body
from jaxserve.server.chat import create_chat_completion
from jaxserve.server.completions import create_completion


class InvocationRequest(msgspec.Struct, kw_only=True):
    """The body of a chat completion or of a completion."""

    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decoder = msgspec.json.Decoder(InvocationRequest)


async def invoke(http: HttpRequest) -> Response:
    """Returns what chat completions or completions would for the same body."""
    body = await read_body(http, _decoder)
    if body.messages is not msgspec.UNSET:
        return await create_chat_completion(http)
    if body.prompt is not msgspec.UNSET:
        return await create_completion(http)
    raise RequestError("the body has neither messages nor prompt", param="messages")
