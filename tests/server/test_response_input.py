"""Responses requests as chat requests."""

import json

import msgspec
import pytest

from jaxserve.errors import RequestError
from jaxserve.server.protocol.responses import InputItem, ResponseRequest
from jaxserve.server.response_input import chat_request, items_of, messages_of, pack_reasoning

TOOLS = [
    {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True},
    {"type": "function", "name": "mul", "description": "multiplies"},
]


def chat_of(**body):
    request = msgspec.convert({"input": "hi", **body}, ResponseRequest)
    return chat_request(request, items_of(request.input))


def messages(*items, instructions=None):
    return messages_of([msgspec.convert(item, InputItem) for item in items], instructions)


def test_fields_get_chats_names():
    chat = chat_of(
        max_output_tokens=5,
        temperature=0.5,
        seed=3,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        reasoning={"effort": "low"},
    )
    assert chat.messages == [{"role": "user", "content": "hi"}]
    assert (chat.max_completion_tokens, chat.temperature, chat.seed) == (5, 0.5, 3)
    assert (chat.logprobs, chat.top_logprobs, chat.reasoning_effort) == (True, 2, "low")


def test_a_text_format_becomes_a_response_format():
    format = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat_of(text={"format": format}).response_format == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
    }
    assert chat_of(text={"format": {"type": "text"}}).response_format == {"type": "text"}


def test_tools_go_one_level_deeper():
    chat = chat_of(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert chat.tools == [
        {
            "type": "function",
            "function": {"name": "add", "parameters": {"type": "object"}, "strict": True},
        },
        {"type": "function", "function": {"name": "mul", "description": "multiplies"}},
    ]
    assert (chat.tool_choice, chat.parallel_tool_calls) == ("required", False)


def test_one_tool_or_some_of_them_can_be_chosen():
    named = chat_of(tools=TOOLS, tool_choice={"type": "function", "name": "mul"})
    assert named.tool_choice == {"type": "function", "function": {"name": "mul"}}
    some = [{"type": "function", "name": "mul"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": some}
    allowed = chat_of(tools=TOOLS, tool_choice=choice)
    assert [tool["function"]["name"] for tool in allowed.tools] == ["mul"]
    assert allowed.tool_choice == "required"
    with pytest.raises(RequestError, match="'div', which is not among tools"):
        chat_of(tools=TOOLS, tool_choice={**choice, "tools": [{"name": "div"}]})


def test_what_the_model_did_in_one_turn_is_one_message():
    call = {"type": "function_call", "name": "add", "arguments": "{}"}
    output = {"type": "function_call_output", "output": "4"}
    said = messages(
        {"role": "user", "content": "q"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I add"}]},
        {**call, "call_id": "1"},
        {**call, "call_id": "2"},
        {**output, "call_id": "1"},
        {**output, "call_id": "2", "output": [{"type": "input_text", "text": "5"}]},
        {"role": "assistant", "content": "nine"},
        {"type": "reasoning", "summary": [], "encrypted_content": pack_reasoning("ü")},
    )
    functions = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    assert said == [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "I add",
            "reasoning": "t",
            "tool_calls": [{"id": "1", **functions}, {"id": "2", **functions}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "tool", "tool_call_id": "2", "content": "5"},
        {"role": "assistant", "content": "nine"},
        {"role": "assistant", "content": None, "reasoning": "ü"},
    ]


def test_arguments_that_were_cut_off_can_be_sent_back():
    call = {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"a": "'}
    (turn,) = messages(call)
    arguments = json.loads(turn["tool_calls"][0]["function"]["arguments"])
    assert arguments == {"INVALID_JSON": '{"a": "'}


def test_instructions_join_the_system_messages_at_the_start():
    said = messages(
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "developer", "content": "d"},
        instructions="a",
    )
    assert said == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "developer", "content": "d"},
    ]


def test_an_image_is_refused_by_its_place():
    with pytest.raises(RequestError) as refused:
        messages(
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_file"}]}
        )
    assert refused.value.param == "input.0.output.0.type"
