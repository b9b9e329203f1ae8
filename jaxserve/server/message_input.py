"""From an Anthropic message request to the chat request that answers it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.protocol.messages import (
    ContentBlock,
    CountRequest,
    InputMessage,
    MessageRequest,
    MessageTool,
    MessageToolChoice,
    ThinkingOptions,
)

# How errors call what chat calls otherwise.
PARAM_NAMES = {
    "prompt": "messages",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "continue_final_message": "messages",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}
# Claude Code's first line of a system prompt: made for Anthropic, and new with every request, so
# that no prefix would be found in the cache.
_BILLING_LINE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: CountRequest) -> ChatRequest:
    """Returns the same request in chat's terms. Raises `RequestError` naming field and block."""
    messages = messages_of(body)
    fields: dict[str, Any] = _tool_fields(body.tools or (), body.tool_choice)
    if variables := _template_variables(body.thinking, body.chat_template_kwargs):
        fields["chat_template_kwargs"] = variables
    if body.thinking is not None and body.thinking.display == "omitted":
        fields["include_reasoning"] = False
    output = body.output_config
    if output is not None and output.effort is not None:
        fields["reasoning_effort"] = output.effort
    if format := output.format if output is not None and output.format else body.output_format:
        fields["response_format"] = _response_format(format)
    if messages and messages[-1]["role"] == "assistant":
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    if isinstance(body, MessageRequest):
        fields |= {
            "max_completion_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "cache_salt": body.cache_salt,
            "request_id": body.request_id,
        }
    return ChatRequest(messages=messages, **fields)


def _response_format(format: dict[str, Any]) -> dict[str, Any]:
    if format.get("type") != "json_schema" or not isinstance(format.get("schema"), dict):
        raise RequestError(
            "output_config.format must be of type json_schema, with a schema",
            param="output_config.format",
        )
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": format["schema"], "strict": True},
    }


def _template_variables(
    thinking: ThinkingOptions | None, given: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns what the template is told; "adaptive" leaves the choice to it."""
    if thinking is None or thinking.type == "adaptive":
        return given or {}
    is_on = thinking.type == "enabled"
    return {"enable_thinking": is_on, "thinking": is_on, **(given or {})}


def _tool_fields(tools: Sequence[MessageTool], choice: MessageToolChoice | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if tools:
        fields["tools"] = [_chat_tool(tool, f"tools.{index}") for index, tool in enumerate(tools)]
    if choice is None:
        return fields
    if choice.type == "tool" and choice.name:
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice.type in _CHOICES:
        fields["tool_choice"] = _CHOICES[choice.type]
    else:
        raise RequestError(
            f"tool_choice.type is {choice.type[:100]!r}; "
            "it is auto, any, none, or tool with a name",
            param="tool_choice.type",
        )
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


def _chat_tool(tool: MessageTool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise RequestError(
            f"{where}.type is {tool.type[:100]!r}; this server takes custom tools",
            param=f"{where}.type",
        )
    if tool.input_schema is None:
        raise RequestError(f"{where}.input_schema is missing", param=f"{where}.input_schema")
    for name, harmless in {
        "input_examples": (None, []),
        "defer_loading": (None, False),
        "allowed_callers": (None, [], ["direct"]),
    }.items():
        if getattr(tool, name) not in harmless:
            raise RequestError(
                f"{where}.{name} is not supported by this server", param=f"{where}.{name}"
            )
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def messages_of(body: CountRequest) -> list[dict[str, Any]]:
    """Returns the conversation as chat messages; the system prompt goes first."""
    messages: list[dict[str, Any]] = []
    if system := _BILLING_LINE.sub("", _text(body.system, "system")):
        messages.append({"role": "system", "content": system})
    for index, message in enumerate(body.messages):
        where = f"messages.{index}"
        match message.role:
            case "user":
                messages += _user_messages(message, where)
            case "assistant":
                messages.append(_assistant_message(message, where))
            case "system":
                content = _text(message.content, f"{where}.content")
                messages.append({"role": "system", "content": content})
            case _:
                raise RequestError(
                    f"{where}.role is {message.role[:100]!r}; it is user, assistant or system",
                    param=f"{where}.role",
                )
    return messages


def _blocks(content: str | list[ContentBlock] | None) -> list[ContentBlock]:
    if isinstance(content, str):
        return [ContentBlock(type="text", text=content)]
    return content or []


def _text(content: str | list[ContentBlock] | None, where: str) -> str:
    """Returns content that may hold text alone."""
    blocks = _blocks(content)
    for index, block in enumerate(blocks):
        if block.type != "text":
            raise _unknown_block(block, f"{where}.{index}", "text")
    return "\n".join(block.text or "" for block in blocks)


def _unknown_block(block: ContentBlock, where: str, taken: str) -> RequestError:
    return RequestError(
        f"{where}.type is {block.type[:100]!r}; this model takes {taken} here",
        param=f"{where}.type",
    )


def _user_messages(message: InputMessage, where: str) -> list[dict[str, Any]]:
    """Returns a turn of the user's: results of tools are messages of their own."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    for index, block in enumerate(_blocks(message.content)):
        place = f"{where}.content.{index}"
        if block.type == "text":
            texts.append(block.text or "")
        elif block.type == "tool_result":
            messages.append(_tool_message(block, place))
        else:
            raise _unknown_block(block, place, "text and tool_result")
    if texts or not messages:
        messages.append({"role": "user", "content": "\n".join(texts)})
    return messages


def _tool_message(block: ContentBlock, where: str) -> dict[str, Any]:
    if not block.tool_use_id:
        raise RequestError(f"{where}.tool_use_id is missing", param=f"{where}.tool_use_id")
    content = _text(block.content, f"{where}.content")
    if block.is_error:
        content = f"Error: {content}"  # templates have no other place for it
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _assistant_message(message: InputMessage, where: str) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(_blocks(message.content)):
        place = f"{where}.content.{index}"
        if block.type == "text":
            texts.append(block.text or "")
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            calls.append(_call(block, place))
        else:
            raise _unknown_block(block, place, "text, thinking and tool_use")
    turn: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) if texts else None}
    if thoughts:
        turn["reasoning"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _call(block: ContentBlock, where: str) -> dict[str, Any]:
    for name in ("id", "name", "input"):
        if getattr(block, name) is None:
            raise RequestError(f"{where}.{name} is missing", param=f"{where}.{name}")
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {
        "id": block.id,
        "type": "function",
        "function": {"name": block.name, "arguments": arguments},
    }
