"""Puts an Anthropic message together, block by block; every step is also the events of a stream."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import orjson

from jaxserve.server.events import Event
from jaxserve.server.protocol.messages import (
    Message,
    MessageUsage,
    OutputBlock,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from jaxserve.text.message import CallDelta, Said


class MessageWriter:
    """Follows one answer from its first token to its last. One task uses it.

    At most one block is open at a time: `content_block_start` opens it, `content_block_stop`
    closes it and adds it to the message.
    """

    def __init__(self, message: Message) -> None:
        self.message = message  # as it is now, empty to begin with
        self._content: list[OutputBlock] = []
        self._open: OutputBlock | None = None  # as it began
        self._call_number: int | None = None
        self._texts: list[str] = []  # of the open block

    @property
    def has_tool_use(self) -> bool:
        """True once the model has called a tool."""
        return self._call_number is not None

    def start(self) -> list[Event]:
        """Returns the events before the first token."""
        return [{"type": "message_start", "message": self.message}, {"type": "ping"}]

    def add(self, said: Said) -> list[Event]:
        """Returns the events of what has been said."""
        events: list[Event] = []
        for call in said.rest:
            events += self._call(call)
        if said.reasoning:
            if not isinstance(self._open, ThinkingBlock):
                events += self._begin(ThinkingBlock(thinking="", signature=""))
            events.append(self._delta("thinking_delta", "thinking", said.reasoning))
        if said.content:
            if not isinstance(self._open, TextBlock):
                events += self._begin(TextBlock(text=""))
            events.append(self._delta("text_delta", "text", said.content))
        for call in said.new_calls:
            events += self._call(call)
        return events

    def finish(
        self, stop_reason: str, stop_sequence: str | None, usage: MessageUsage
    ) -> list[Event]:
        """Returns the last events; `message` is then complete."""
        events = [] if self._open or self._content else self._begin(TextBlock(text=""))
        events += self._close()
        self.message = dataclasses.replace(
            self.message,
            content=self._content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=usage,
        )
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return [
            *events,
            {"type": "message_delta", "delta": delta, "usage": usage},
            {"type": "message_stop"},
        ]

    def _call(self, call: CallDelta) -> list[Event]:
        events: list[Event] = []
        if call.name is not None:
            events = self._begin(ToolUseBlock(id=call.id or "", name=call.name, input={}))
            self._call_number = call.number
        is_open = isinstance(self._open, ToolUseBlock) and self._call_number == call.number
        assert is_open, f"{call=} is not open"
        if call.arguments:
            events.append(self._delta("input_json_delta", "partial_json", call.arguments))
        return events

    def _begin(self, block: OutputBlock) -> list[Event]:
        events = self._close()
        self._open = block
        self._texts = []
        index = len(self._content)
        return [*events, {"type": "content_block_start", "index": index, "content_block": block}]

    def _delta(self, kind: str, name: str, text: str) -> Event:
        self._texts.append(text)
        index, delta = len(self._content), {"type": kind, name: text}
        return {"type": "content_block_delta", "index": index, "delta": delta}

    def _close(self) -> list[Event]:
        if self._open is None:
            return []
        index, block = len(self._content), _whole(self._open, "".join(self._texts))
        events: list[Event] = [{"type": "content_block_stop", "index": index}]
        if isinstance(block, ThinkingBlock):
            delta = {"type": "signature_delta", "signature": block.signature}
            events.insert(0, {"type": "content_block_delta", "index": index, "delta": delta})
        self._content.append(block)
        self._open = None
        return events


def _whole(block: OutputBlock, text: str) -> OutputBlock:
    match block:
        case TextBlock():
            return dataclasses.replace(block, text=text)
        case ThinkingBlock():
            # Clients keep a thinking block only with a signature; nothing here depends on it.
            signature = hashlib.sha256(text.encode()).hexdigest()
            return dataclasses.replace(block, thinking=text, signature=signature)
        case ToolUseBlock():
            return dataclasses.replace(block, input=_input(text))


def _input(arguments: str) -> Any:
    """Returns a call's arguments; if they are no object, they go under Anthropic's name for that.

    So do those that a reply cannot hold, such as 300 lists in one another.
    """
    try:
        value = orjson.loads(arguments or "{}")
        orjson.dumps(value)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}
