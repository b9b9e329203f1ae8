"""Thinking and tool calls in Responses and Messages, over a real socket."""

import json

import httpx2
import openai
import pytest

from jaxserve.server.model_text import ModelText
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.message_format import message_format
from tests.fakes import byte_tokenizer
from tests.server.serving import EchoServer

# The engine says what the messages say.
TEMPLATE = "{% if tools %}{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}"
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
SAID = f"<think>hm</think>I add{CALL}<end>"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "name": "add", "parameters": SCHEMA}


@pytest.fixture(scope="module")
def server():
    with EchoServer(max_model_len=1024) as server:
        server.state.text = ModelText(
            tokenizer=byte_tokenizer(),
            chat_template=ChatTemplate(TEMPLATE),
            defaults={},
            format=message_format("hermes", "qwen3", None),
        )
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


ASKED = {"model": "echo", "tools": [TOOL], "extra_body": {"stop": "<end>"}}


def test_a_response_has_the_reasoning_the_text_and_the_call(client):
    response = client.responses.create(input=SAID, include=["reasoning.encrypted_content"], **ASKED)
    reasoning, message, call = response.output
    assert reasoning.content[0].text == "hm"
    assert message.content[0].text == "I add"
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})
    assert response.status == "completed"
    assert response.usage.output_tokens_details.reasoning_tokens == 2
    # Its items are an input: with the call's output, then as what was stored.
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "2<end>"}
    again = client.responses.create(input=[*response.output, output], **ASKED)
    assert again.output_text == "I add2"
    stored = client.responses.create(input=[output], previous_response_id=response.id, **ASKED)
    assert stored.usage.input_tokens == len(SAID) + len("I add2<end>")


def test_a_stream_tells_the_call_piece_by_piece(client):
    events = list(client.responses.create(input=SAID, stream=True, **ASKED))
    said = {"reasoning_text": "", "output_text": "", "function_call_arguments": ""}
    for event in events:
        if event.type.endswith(".delta"):
            said[event.type.split(".")[1]] += event.delta
    assert said == {
        "reasoning_text": "hm",
        "output_text": "I add",
        "function_call_arguments": '{"a": 1}',
    }
    assert [item.type for item in events[-1].response.output] == [
        "reasoning",
        "message",
        "function_call",
    ]


def test_logprobs_are_those_of_the_content(client):
    response = client.responses.create(
        input=SAID, include=["message.output_text.logprobs"], **ASKED
    )
    (message,) = [item for item in response.output if item.type == "message"]
    assert "".join(entry.token for entry in message.content[0].logprobs) == "I add"


def test_a_message_has_the_thinking_the_text_and_the_call(server):
    asked = {
        "messages": [{"role": "user", "content": SAID}],
        "max_tokens": 200,
        "tools": [{"name": "add", "input_schema": SCHEMA}],
        "stop_sequences": ["<end>"],
    }
    with httpx2.Client(base_url=server.url) as http:
        message = http.post("/v1/messages", json=asked).json()
        stream = http.post("/v1/messages", json=asked | {"stream": True}).text
        counted = http.post("/v1/messages/count_tokens", json=asked).json()
    thinking, text, use = message["content"]
    assert (thinking["thinking"], text["text"]) == ("hm", "I add")
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "add", {"a": 1})
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": 2}
    assert counted["input_tokens"] == message["usage"]["input_tokens"] == len(SAID)
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("partial_json", "") for delta in deltas) == '{"a": 1}'
    assert "".join(delta.get("thinking", "") for delta in deltas) == "hm"


def test_thinking_can_be_left_out_of_a_message(server):
    asked = {
        "messages": [{"role": "user", "content": SAID}],
        "max_tokens": 200,
        "thinking": {"type": "adaptive", "display": "omitted"},
        "stop_sequences": ["<tool_call>"],
    }
    with httpx2.Client(base_url=server.url) as http:
        message = http.post("/v1/messages", json=asked).json()
    assert [block["type"] for block in message["content"]] == ["text"]
