"""What travels between the front and the engine process: msgpack frames, never pickle.

All that one engine step brings travels in one frame. Host only: imports no jax.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from jaxserve.engine.frames import MAX_FRAME_BYTES, frame_of
from jaxserve.engine.info import EngineInfo, EngineStats
from jaxserve.engine.repetition import RepetitionDetection
from jaxserve.engine.request import Request, SamplingParams, Update
from jaxserve.errors import RequestError
from jaxserve.structured_outputs import Grammar, Vocabulary


class Start(msgspec.Struct, array_like=True, tag=True):
    """The front's first frame: the engine's options."""

    config: dict[str, Any]


class SetVocabulary(msgspec.Struct, array_like=True, tag=True):
    """What the model's tokens are made of, once the text side has loaded."""

    vocabulary: Vocabulary


class Prepare(msgspec.Struct, array_like=True, tag=True):
    """A grammar to compile for requests that follow; answered by `Admitted`."""

    call: int
    grammar: Grammar


class Submit(msgspec.Struct, array_like=True, tag=True):
    """Requests that are admitted all together or not at all; answered by `Admitted`."""

    call: int
    requests: list[RequestFrame]


class RequestFrame(msgspec.Struct, array_like=True):
    """A `Request` with only those sampling parameters that differ from their defaults."""

    request_id: str
    prompt_tokens: tuple[int, ...]
    params: dict[str, Any]
    priority: int
    cache_salt: str
    arrival_s: float


class Abort(msgspec.Struct, array_like=True, tag=True):
    """Requests whose client has left."""

    request_ids: list[str]


class AskStats(msgspec.Struct, array_like=True, tag=True):
    """Answered by `Stats`."""

    call: int


class Close(msgspec.Struct, array_like=True, tag=True):
    """The engine process is to end; in order, and its cluster with it, where there is no reason."""

    reason: str | None = None


class Progress(msgspec.Struct, array_like=True, tag=True):
    """A line about loading, for the log."""

    line: str


class Ready(msgspec.Struct, array_like=True, tag=True):
    """The engine takes requests from now on."""

    info: EngineInfo


class Admitted(msgspec.Struct, array_like=True, tag=True):
    """The answer to `Prepare` and `Submit`; `kind` names the error that refused it."""

    call: int
    kind: str | None = None
    message: str = ""
    param: str | None = None


class Updates(msgspec.Struct, array_like=True, tag=True):
    """What one step brought for every request that it touched."""

    updates: list[Update]


class Stats(msgspec.Struct, array_like=True, tag=True):
    """The answer to `AskStats`."""

    call: int
    stats: EngineStats


class Died(msgspec.Struct, array_like=True, tag=True):
    """The engine cannot go on; the process ends after this frame."""

    kind: str
    message: str


class Joined(msgspec.Struct, array_like=True, tag=True):
    """Process 0 of the cluster has been heard: from now on it decides when this process ends."""


class Ended(msgspec.Struct, array_like=True, tag=True):
    """The engine has ended in order, as process 0 of its cluster asked; the process ends."""


ToEngine = Start | SetVocabulary | Prepare | Submit | Abort | AskStats | Close
ToFront = Progress | Joined | Ready | Admitted | Updates | Stats | Died | Ended

_encoder = msgspec.msgpack.Encoder()
engine_decoder = msgspec.msgpack.Decoder(ToEngine)
front_decoder = msgspec.msgpack.Decoder(ToFront)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}


def pack_frame(message: ToEngine | ToFront) -> bytes:
    """Returns the message with its length in front. Raises `RequestError` if it is too large."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise RequestError(
            f"the message to or from the engine has {len(body)} bytes; "
            f"the limit is {MAX_FRAME_BYTES}"
        )
    return frame_of(body)


def pack_request(request: Request) -> RequestFrame:
    """Returns the request as it travels."""
    values = ((name, getattr(request.params, name)) for name in _DEFAULTS)
    return RequestFrame(
        request.request_id,
        request.prompt_tokens,
        {name: value for name, value in values if value != _DEFAULTS[name]},
        request.priority,
        request.cache_salt,
        request.arrival_s,
    )


def unpack_request(frame: RequestFrame) -> Request:
    """Returns the request equal to the one that was packed."""
    params = dict(frame.params)
    if words := params.get("bad_word_tokens"):
        params["bad_word_tokens"] = tuple(tuple(word) for word in words)
    if (detection := params.get("repetition_detection")) is not None:
        params["repetition_detection"] = RepetitionDetection(**detection)
    if grammar := params.get("grammar"):
        params["grammar"] = msgspec.convert(grammar, Grammar)
    return Request(
        request_id=frame.request_id,
        prompt_tokens=frame.prompt_tokens,
        params=SamplingParams(**params),
        priority=frame.priority,
        cache_salt=frame.cache_salt,
        arrival_s=frame.arrival_s,
    )
