"""Anthropic requests as chat requests, and blocks as they are said."""

import json

import msgspec
import orjson
import pytest

from jaxserve.server.message_input import chat_request
from jaxserve.server.message_writer import MessageWriter
from jaxserve.server.protocol.messages import Message, MessageRequest, MessageUsage
from jaxserve.text.message import CallDelta, Said

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat_of(**body):
    hi = [{"role": "user", "content": "hi"}]
    return chat_request(msgspec.convert({"messages": hi, "max_tokens": 5, **body}, MessageRequest))


def test_fields_get_chats_names():
    chat = chat_of(stop_sequences=["x"], top_k=4, output_config={"effort": "high"})
    assert (chat.max_completion_tokens, chat.stop, chat.top_k) == (5, ["x"], 4)
    assert chat.reasoning_effort == "high"


def test_thinking_is_told_to_the_template():
    enabled = {"type": "enabled", "budget_tokens": 2000}
    assert chat_of(thinking=enabled).chat_template_kwargs == {
        "enable_thinking": True,
        "thinking": True,
    }
    disabled = chat_of(thinking={"type": "disabled"}, chat_template_kwargs={"x": 1})
    assert disabled.chat_template_kwargs == {"enable_thinking": False, "thinking": False, "x": 1}
    adaptive = chat_of(thinking={"type": "adaptive", "display": "omitted"})
    assert adaptive.chat_template_kwargs is None
    assert adaptive.include_reasoning is False


def test_tools_and_choices_get_chats_form():
    tool = {"name": "add", "description": "adds", "input_schema": SCHEMA}
    chat = chat_of(tools=[tool], tool_choice={"type": "any", "disable_parallel_tool_use": True})
    function = {"name": "add", "parameters": SCHEMA, "description": "adds"}
    assert chat.tools == [{"type": "function", "function": function}]
    assert (chat.tool_choice, chat.parallel_tool_calls) == ("required", False)
    named = chat_of(tools=[tool], tool_choice={"type": "tool", "name": "add"})
    assert named.tool_choice == {"type": "function", "function": {"name": "add"}}


def test_blocks_become_messages_calls_and_results():
    use = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": "ü"}}
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True}
    chat = chat_of(
        messages=[
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [thinking, {"type": "text", "text": "I add"}, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "well?"}]},
        ]
    )
    function = {"name": "add", "arguments": '{"a": "ü"}'}
    assert chat.messages[1:] == [
        {
            "role": "assistant",
            "content": "I add",
            "reasoning": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "Error: no"},
        {"role": "user", "content": "well?"},
    ]
    assert chat.add_generation_prompt is None


def test_the_line_that_changes_with_every_request_is_dropped():
    billing = "x-anthropic-billing-header: cc_version=2.1; cch=0aaa9;"
    blocks = [{"type": "text", "text": text} for text in (billing, "Be brief.")]
    assert chat_of(system=blocks).messages[0] == {"role": "system", "content": "Be brief."}
    (only,) = chat_of(system=billing).messages
    assert only["role"] == "user"


def test_a_schema_becomes_a_response_format():
    format = {"type": "json_schema", "schema": SCHEMA}
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    asked["json_schema"]["strict"] = True
    assert chat_of(output_config={"format": format}).response_format == asked
    assert chat_of(output_format=format).response_format == asked


@pytest.mark.parametrize(
    "said", ['{"a": ', "[1]", '{"a": ' + "[" * 300 + "]" * 300 + "}", '{"a": NaN}']
)
def test_arguments_that_no_reply_can_hold_are_told_as_text(said):
    usage = MessageUsage(input_tokens=1, output_tokens=2)
    writer = MessageWriter(Message(id="msg_1", model="m", content=[], usage=usage))
    writer.add(Said(calls=(CallDelta(0, said, "t0", "add"),)))
    writer.finish("tool_use", None, usage)
    (use,) = json.loads(orjson.dumps(writer.message))["content"]
    assert use["input"] == {"INVALID_JSON": said}


def test_thinking_text_and_tool_use_are_blocks_of_their_own():
    usage = MessageUsage(input_tokens=1, output_tokens=2)
    writer = MessageWriter(Message(id="msg_1", model="m", content=[], usage=usage))
    events = writer.start() + writer.add(Said(reasoning="hm", content="I "))
    events += writer.add(Said(content="add", calls=(CallDelta(0, '{"a"', "t0", "add"),)))
    events += writer.add(Said(calls=(CallDelta(0, ":1}"), CallDelta(1, '{"b', "t1", "mul"))))
    events += writer.finish("tool_use", None, usage)
    sent = [orjson.loads(orjson.dumps(event)) for event in events]
    kinds = [
        (e.get("index"), e["delta"]["type"] if "index" in e and "delta" in e else e["type"])
        for e in sent
    ]
    assert kinds == [
        (None, "message_start"),
        (None, "ping"),
        (0, "content_block_start"),
        (0, "thinking_delta"),
        (0, "signature_delta"),
        (0, "content_block_stop"),
        (1, "content_block_start"),
        (1, "text_delta"),
        (1, "text_delta"),
        (1, "content_block_stop"),
        (2, "content_block_start"),
        (2, "input_json_delta"),
        (2, "input_json_delta"),
        (2, "content_block_stop"),
        (3, "content_block_start"),
        (3, "input_json_delta"),
        (3, "content_block_stop"),
        (None, "message_delta"),
        (None, "message_stop"),
    ]
    message = json.loads(orjson.dumps(writer.message))
    thinking, text, add, mul = message["content"]
    assert (thinking["thinking"], text["text"]) == ("hm", "I add")
    assert thinking["signature"] == sent[4]["delta"]["signature"] != ""
    assert add == {"type": "tool_use", "id": "t0", "name": "add", "input": {"a": 1}}
    assert mul["input"] == {"INVALID_JSON": '{"b'}
    assert message["stop_reason"] == "tool_use"
