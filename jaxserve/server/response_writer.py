"""Puts a Responses reply together, item by item; every step is also the events of a stream."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from jaxserve.engine.request import FinishReason
from jaxserve.server.events import Event
from jaxserve.server.protocol.responses import (
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    Response,
    ResponseUsage,
)
from jaxserve.server.response_input import pack_reasoning
from jaxserve.text.message import CallDelta, Said


def new_id(prefix: str) -> str:
    """Returns an id that nobody can guess."""
    return f"{prefix}_{secrets.token_hex(24)}"


class ResponseWriter:
    """Follows one answer from its first token to its last. One task uses it.

    At most one item is open at a time: `output_item.added` opens it, `output_item.done` closes it
    and adds it to the response.
    """

    def __init__(self, response: Response, *, packs_reasoning: bool = False) -> None:
        self.response = response  # as it is now, in_progress to begin with
        self._packs_reasoning = packs_reasoning
        self._output: list[OutputItem] = []
        self._open: _Message | _Reasoning | _Call | None = None
        self._early: list[Any] = []  # log-probabilities of tokens that have brought no text yet
        self._num_events = 0

    def start(self) -> list[Event]:
        """Returns the events before the first token."""
        return [
            self._event("response.created", response=self.response),
            self._event("response.in_progress", response=self.response),
        ]

    def add(self, said: Said, logprobs: Sequence[Any] = ()) -> list[Event]:
        """Returns the events of what has been said, with the log-probabilities of its content."""
        events: list[Event] = []
        for call in said.rest:
            events += self._call(call)
        if said.reasoning:
            events += self._say(_Reasoning, said.reasoning)
        self._early.extend(logprobs)
        if said.content or isinstance(self._open, _Message):
            events += self._say(_Message, said.content)
        for call in said.new_calls:
            events += self._call(call)
        return events

    def finish(self, reason: FinishReason, usage: ResponseUsage) -> list[Event]:
        """Returns the last events; `response` is then complete, or incomplete and says why."""
        is_whole = reason != "length"
        events = [] if self._open or self._output else self._say(_Message, "")
        events += self._close("completed" if is_whole else "incomplete")
        self.response = dataclasses.replace(
            self.response,
            status="completed" if is_whole else "incomplete",
            completed_at=int(time.time()) if is_whole else None,
            incomplete_details=None if is_whole else {"reason": "max_output_tokens"},
            output=self._output,
            usage=usage,
        )
        return [*events, self._event(f"response.{self.response.status}", response=self.response)]

    def fail(self, message: str) -> list[Event]:
        """Returns the event of an engine that has stopped."""
        self.response = dataclasses.replace(
            self.response,
            status="failed",
            error={"code": "server_error", "message": message},
            output=self._output,
        )
        return [self._event("response.failed", response=self.response)]

    def _event(self, kind: str, **fields: Any) -> Event:
        number = self._num_events
        self._num_events += 1
        return {"type": kind, **fields, "sequence_number": number}

    def _say(self, kind: type[_Message] | type[_Reasoning], text: str) -> list[Event]:
        item, events = self._open, []
        if not isinstance(item, kind):
            events = self._close("completed")
            item = kind(self._packs_reasoning)
            events += self._begin(item)
            events.append(
                self._event("response.content_part.added", **self._place(0), part=item.part(""))
            )
        item.texts.append(text)
        more = {}
        if isinstance(item, _Message):
            more["logprobs"] = logprobs = self._early
            self._early = []
            item.logprobs.extend(logprobs)
        if text or more.get("logprobs"):
            events.append(self._event(f"{item.kind}.delta", **self._place(0), delta=text, **more))
        return events

    def _call(self, call: CallDelta) -> list[Event]:
        item, events = self._open, []
        if call.name is not None:
            events = self._close("completed")
            item = _Call(call.number, call.id or new_id("call"), call.name)
            events += self._begin(item)
        assert isinstance(item, _Call) and item.number == call.number, f"{call=} is not open"
        if call.arguments:
            item.texts.append(call.arguments)
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, **self._place(), delta=call.arguments))
        return events

    def _begin(self, item: _Message | _Reasoning | _Call) -> list[Event]:
        self._open = item
        index, shown = len(self._output), item.snapshot("in_progress")
        return [self._event("response.output_item.added", output_index=index, item=shown)]

    def _place(self, content_index: int | None = None) -> dict[str, Any]:
        assert self._open is not None
        place: dict[str, Any] = {"item_id": self._open.id, "output_index": len(self._output)}
        return place if content_index is None else place | {"content_index": content_index}

    def _close(self, status: str) -> list[Event]:
        item = self._open
        if item is None:
            return []
        text, whole = "".join(item.texts), item.snapshot(status)
        if isinstance(item, _Call):
            kind = "response.function_call_arguments.done"
            events = [self._event(kind, **self._place(), name=item.name, arguments=text)]
        else:
            more = {"logprobs": item.logprobs} if isinstance(item, _Message) else {}
            part = item.part(text)
            events = [
                self._event(f"{item.kind}.done", **self._place(0), text=text, **more),
                self._event("response.content_part.done", **self._place(0), part=part),
            ]
        index = len(self._output)
        events.append(self._event("response.output_item.done", output_index=index, item=whole))
        self._output.append(whole)
        self._open = None
        return events


class _Message:
    """Content, while it is being said."""

    kind = "response.output_text"

    def __init__(self, _: bool) -> None:
        self.id = new_id("msg")
        self.texts: list[str] = []
        self.logprobs: list[Any] = []

    def part(self, text: str) -> OutputText:
        return OutputText(text=text, logprobs=self.logprobs if text else [])

    def snapshot(self, status: str) -> OutputMessage:
        is_new = status == "in_progress"
        content = [] if is_new else [self.part("".join(self.texts))]
        return OutputMessage(id=self.id, status=status, content=content)


class _Reasoning:
    """Reasoning, while it is being said."""

    kind = "response.reasoning_text"

    def __init__(self, is_packed: bool) -> None:
        self.id = new_id("rs")
        self.texts: list[str] = []
        self._is_packed = is_packed

    def part(self, text: str) -> ReasoningText:
        return ReasoningText(text=text)

    def snapshot(self, status: str) -> OutputReasoning:
        text = "".join(self.texts)
        if status == "in_progress":
            return OutputReasoning(id=self.id, status=status, content=[])
        packed = pack_reasoning(text) if self._is_packed else None
        return OutputReasoning(
            id=self.id, status=status, content=[self.part(text)], encrypted_content=packed
        )


class _Call:
    """A call, while its arguments are being said."""

    def __init__(self, number: int, call_id: str, name: str) -> None:
        self.id = new_id("fc")
        self.texts: list[str] = []
        self.number = number
        self.name = name
        self._call_id = call_id

    def snapshot(self, status: str) -> OutputCall:
        return OutputCall(
            id=self.id,
            status=status,
            call_id=self._call_id,
            name=self.name,
            arguments="".join(self.texts),
        )
