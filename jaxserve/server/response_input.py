"""From a Responses request to the chat request that answers it."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from jaxserve.errors import RequestError
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.protocol.responses import (
    INCLUDE_LOGPROBS,
    ContentPart,
    FunctionTool,
    InputItem,
    ResponseRequest,
    ToolChoice,
)

# Fields that chat has under the same name.
SAME_IN_CHAT = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "logit_bias",
    "skip_special_tokens",
    "chat_template_kwargs",
    "structured_outputs",
    "priority",
    "cache_salt",
    "request_id",
)
# How errors call what chat calls otherwise.
PARAM_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
_REASONING_PARTS = ("reasoning_text", "summary_text", "text")
_ROLES = ("user", "assistant", "system", "developer")


def items_of(given: str | Sequence[InputItem]) -> list[InputItem]:
    """Returns the input as items: a text is a user's message."""
    if isinstance(given, str):
        return [InputItem(type="message", role="user", content=given)] if given else []
    return list(given)


def chat_request(
    body: ResponseRequest,
    items: Sequence[InputItem],  # the whole conversation, earlier responses included
) -> ChatRequest:
    """Returns the same request in chat's terms. Raises `RequestError` naming field and item."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in SAME_IN_CHAT}
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    if INCLUDE_LOGPROBS in (body.include or ()):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    fields |= _tool_fields(body)
    return ChatRequest(messages=messages_of(items, body.instructions), **fields)


def _response_format(format: Mapping[str, Any]) -> dict[str, Any]:
    """Returns chat's form, in which a schema and its name lie one level deeper."""
    if format.get("type") != "json_schema":
        return dict(format)
    schema = {key: value for key, value in format.items() if key != "type"}
    return {"type": "json_schema", "json_schema": schema}


def _tool_fields(body: ResponseRequest) -> dict[str, Any]:
    tools = list(body.tools or ())
    for index, tool in enumerate(tools):
        _check_tool(tool, f"tools.{index}")
    choice: str | dict[str, Any] | None
    if isinstance(body.tool_choice, ToolChoice):
        tools, choice = _chosen(body.tool_choice, tools)
    else:
        choice = body.tool_choice
    fields: dict[str, Any] = {}
    if tools:
        fields["tools"] = [_chat_tool(tool) for tool in tools]
    if choice is not None:
        fields["tool_choice"] = choice
    if body.parallel_tool_calls is not None and tools:
        fields["parallel_tool_calls"] = body.parallel_tool_calls
    return fields


def _check_tool(tool: FunctionTool, where: str) -> None:
    if tool.type != "function":
        raise RequestError(
            f"{where}.type is {tool.type[:100]!r}; this server takes function tools",
            param=f"{where}.type",
        )
    if not tool.name:
        raise RequestError(f"{where} has no name", param=f"{where}.name")
    if tool.defer_loading:
        raise RequestError(
            "defer_loading is not supported by this server", param=f"{where}.defer_loading"
        )


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    names = ("name", "description", "parameters", "strict")
    given = {name: value for name in names if (value := getattr(tool, name)) is not None}
    return {"type": "function", "function": given}


def _chosen(
    choice: ToolChoice, tools: list[FunctionTool]
) -> tuple[list[FunctionTool], str | dict[str, Any]]:
    """Returns the tools that may be called, and chat's tool_choice."""
    if choice.type == "function" and choice.name:
        return tools, {"type": "function", "function": {"name": choice.name}}
    if choice.type != "allowed_tools":
        raise RequestError(
            f"tool_choice has the type {choice.type[:100]!r}; "
            "this server takes function (with a name) and allowed_tools",
            param="tool_choice",
        )
    if choice.mode not in ("auto", "required"):
        raise RequestError(
            f"tool_choice.mode is {choice.mode!r}; it is auto or required",
            param="tool_choice.mode",
        )
    allowed = {str(entry.get("name")) for entry in choice.tools or ()}
    known = {tool.name for tool in tools}
    for name in allowed:
        if name not in known:
            raise RequestError(
                f"tool_choice allows {name!r}, which is not among tools", param="tool_choice.tools"
            )
    return [tool for tool in tools if tool.name in allowed], choice.mode


def messages_of(items: Sequence[InputItem], instructions: str | None) -> list[dict[str, Any]]:
    """Returns the items as chat messages; the instructions go first."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for index, item in enumerate(items):
        where = f"input.{index}"
        match item.type:
            case None | "message":
                _add_message(messages, item, where)
            case "reasoning":
                if thought := _thought(item, where):
                    _turn(messages, before=("content", "tool_calls"))["reasoning"] = thought
            case "function_call":
                calls = _turn(messages, before=()).setdefault("tool_calls", [])
                calls.append(_call(item, where))
            case "function_call_output":
                messages.append(_call_output(item, where))
            case _:
                raise RequestError(
                    f"{where}.type is {item.type[:100]!r}; this server takes message, reasoning, "
                    "function_call and function_call_output",
                    param=f"{where}.type",
                )
    return messages


def _turn(
    messages: list[dict[str, Any]],
    before: Sequence[str],  # what must not have been said in the turn yet
) -> dict[str, Any]:
    """Returns the assistant's message that an item belongs to: the last one, or a new one."""
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and not any(last.get(name) for name in before):
        return last
    messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _add_message(messages: list[dict[str, Any]], item: InputItem, where: str) -> None:
    if item.role not in _ROLES:
        raise RequestError(
            f"{where}.role is {item.role!r}; it is one of {', '.join(_ROLES)}",
            param=f"{where}.role",
        )
    content = _content(item.content, f"{where}.content")
    if item.role == "assistant":
        _turn(messages, before=("content", "tool_calls"))["content"] = content
        return
    is_first = all(message["role"] in ("system", "developer") for message in messages)
    if item.role != "user" and messages and is_first:
        # Templates know one system message, at the start.
        messages[0] = {"role": "system", "content": f"{messages[0]['content']}\n\n{content}"}
        return
    messages.append({"role": item.role, "content": content})


def _content(content: str | list[ContentPart] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_texts(content, where, _TEXT_PARTS))


def _texts(parts: Sequence[ContentPart], where: str, kinds: Sequence[str]) -> list[str]:
    for index, part in enumerate(parts):
        if part.type not in kinds:
            raise RequestError(
                f"{where}.{index}.type is {part.type[:100]!r}; this model takes {kinds[0]}",
                param=f"{where}.{index}.type",
            )
    return [part.refusal if part.type == "refusal" else part.text or "" for part in parts]  # type: ignore[misc]


def _thought(item: InputItem, where: str) -> str:
    """Returns a reasoning's text: its content, else what it was packed into, else its summary."""
    if item.content:
        if isinstance(item.content, str):
            return item.content
        return "\n".join(_texts(item.content, f"{where}.content", _REASONING_PARTS))
    if item.encrypted_content:
        return unpack_reasoning(item.encrypted_content, f"{where}.encrypted_content")
    return "\n".join(_texts(item.summary or (), f"{where}.summary", _REASONING_PARTS))


def pack_reasoning(text: str) -> str:
    """Returns a reasoning for a client to keep and bring back. It is coded, not secret."""
    return base64.b64encode(text.encode()).decode()


def unpack_reasoning(packed: str, param: str) -> str:
    """Returns what `pack_reasoning` packed. Raises `RequestError`."""
    try:
        return base64.b64decode(packed, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise RequestError(f"{param} was not made by this server", param=param) from None


def _call(item: InputItem, where: str) -> dict[str, Any]:
    for name in ("call_id", "name", "arguments"):
        if getattr(item, name) is None:
            raise RequestError(f"{where}.{name} is missing", param=f"{where}.{name}")
    return {
        "id": item.call_id,
        "type": "function",
        "function": {"name": item.name, "arguments": _json_object(item.arguments or "")},
    }


def _json_object(arguments: str) -> str:
    """Returns a call's arguments; those that were cut off are wrapped, as templates take objects.

    A client sends back what the model once said, and must not be stuck with it.
    """
    try:
        is_object = isinstance(json.loads(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        is_object = False
    return arguments if is_object else json.dumps({"INVALID_JSON": arguments}, ensure_ascii=False)


def _call_output(item: InputItem, where: str) -> dict[str, Any]:
    for name in ("call_id", "output"):
        if getattr(item, name) is None:
            raise RequestError(f"{where}.{name} is missing", param=f"{where}.{name}")
    content = _content(item.output, f"{where}.output")
    return {"role": "tool", "tool_call_id": item.call_id, "content": content}


def echoed_choice(choice: str | ToolChoice | None) -> Any:
    """Returns tool_choice as replies show it."""
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        return choice
    shown = msgspec.to_builtins(choice)
    return {name: value for name, value in shown.items() if value is not None}


def echoed_tools(tools: Sequence[FunctionTool] | None) -> list[dict[str, Any]]:
    """Returns tools as replies show them."""
    names = ("type", "name", "description", "parameters", "strict")
    return [{name: getattr(tool, name) for name in names} for tool in tools or ()]
