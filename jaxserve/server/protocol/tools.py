"""Tools in chat requests, checked, and tool calls in replies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from jaxserve.errors import RequestError
from jaxserve.text.message import CallDelta, Said
from jaxserve.text.tool_parsers.tools import Tools

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 1024
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class Named:
    """The choice of one tool."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | Named


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """What a request says of tools."""

    definitions: list[dict[str, Any]]  # as the client wrote them, for the chat template
    schemas: Tools
    choice: ToolChoice
    max_calls: int | None
    is_strict: bool  # some tool's calls must fit its schema

    @property
    def callable(self) -> Tools:
        """The tools that the choice leaves."""
        choice = self.choice
        return (
            {choice.name: self.schemas[choice.name]} if isinstance(choice, Named) else self.schemas
        )

    @property
    def is_guaranteed(self) -> bool:
        """True if calls must fit their tools' schemas."""
        return self.choice == "required" or isinstance(self.choice, Named) or self.is_strict

    @property
    def parsed(self) -> Tools | None:
        """The tools whose calls are looked for; None leaves the text as it is."""
        return None if self.choice == "none" else self.schemas


def tool_use(
    tools: list[dict[str, Any]] | None,
    choice: Any,
    parallel: bool | None,  # False keeps the first call only
) -> ToolUse | None:
    """Returns a request's tools; None if there are none. Raises `RequestError`."""
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", param="tool_choice")
        return None
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise RequestError(
            f"tools has {len(tools)} entries; it takes 1 to {MAX_TOOLS}", param="tools"
        )
    num_bytes = _num_bytes(tools)
    if num_bytes > MAX_TOOLS_BYTES:
        raise RequestError(
            f"tools has {num_bytes} bytes; the limit is {MAX_TOOLS_BYTES}", param="tools"
        )
    schemas: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        name, schema = _checked(tool, f"tools[{index}]")
        if name in schemas:
            raise RequestError(f"tools[{index}] has the name {name!r} again", param="tools")
        schemas[name] = schema
    return ToolUse(
        definitions=tools,
        schemas=schemas,
        choice=_choice(choice, schemas),
        max_calls=1 if parallel is False else None,
        is_strict=any(tool["function"].get("strict") is True for tool in tools),
    )


def _num_bytes(tools: list[dict[str, Any]]) -> int:
    try:
        return len(orjson.dumps(tools))
    except orjson.JSONEncodeError as error:  # it nests too deep, or holds too large an integer
        raise RequestError(f"tools cannot be written as JSON: {error}", param="tools") from error


def _checked(tool: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Returns a tool's name and schema."""
    if tool.get("type") != "function":
        raise RequestError(
            f"{where}.type is {tool.get('type')!r}; it must be 'function'", param="tools"
        )
    function = tool.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function must be an object", param="tools")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.function.name is {str(name)[:80]!r}; it takes 1 to 64 letters, digits, _ - .",
            param="tools",
        )
    if not isinstance(function.get("description"), str | None):
        raise RequestError(f"{where}.function.description must be a string", param="tools")
    if not isinstance(function.get("strict"), bool | None):
        raise RequestError(f"{where}.function.strict must be a boolean", param="tools")
    schema = function.get("parameters")
    if schema is None:
        return name, {}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise RequestError(
            f"{where}.function.parameters must be a JSON schema of type 'object'", param="tools"
        )
    return name, schema


def _choice(choice: Any, schemas: Tools) -> ToolChoice:
    if choice is None:
        return "auto"
    if choice in ("none", "auto", "required"):
        return choice
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or choice.get("type") != "function":
        raise RequestError(
            f"tool_choice is {str(choice)[:80]}; it takes none, auto, required or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    name = function.get("name")
    if not isinstance(name, str) or name not in schemas:
        raise RequestError(
            f"tool_choice names {str(name)[:80]!r}; tools has no such function", param="tool_choice"
        )
    return Named(name=name)


def message_body(role: str, said: Said) -> dict[str, Any]:
    """Returns the message of a reply, with the reasoning under both of its names."""
    message: dict[str, Any] = {
        "role": role,
        "content": said.content or (None if said.calls or said.reasoning else ""),
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": said.reasoning or None,
        "reasoning_content": said.reasoning or None,
    }
    if said.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in said.calls
        ]
    return message


def delta_body(said: Said) -> dict[str, Any]:
    """Returns the delta of a chunk: only what is new."""
    delta: dict[str, Any] = {}
    if said.reasoning:
        delta["reasoning"] = delta["reasoning_content"] = said.reasoning
    if said.content:
        delta["content"] = said.content
    if said.calls:
        delta["tool_calls"] = [_call_delta(call) for call in said.calls]
    return delta


def _call_delta(call: CallDelta) -> dict[str, Any]:
    function = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.number, "function": function}
    return {
        "index": call.number,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, **function},
    }


def reason_of(finish_reason: str | None, num_calls: int, use: ToolUse | None) -> str | None:
    """Returns the finish reason as clients see it: calls are told, but not one that was forced."""
    is_forced = use is not None and isinstance(use.choice, Named)
    return (
        "tool_calls" if finish_reason == "stop" and num_calls and not is_forced else finish_reason
    )
