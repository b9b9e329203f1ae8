"""/v1/messages over a real socket: its form, its events, its errors."""

import json

import httpx2
import pytest

from jaxserve.config import ServerConfig
from tests.server.serving import EchoServer

HI = [{"role": "user", "content": "hi"}]  # renders as u:hi;a:
HEADERS = {"x-api-key": "key", "anthropic-version": "2023-06-01"}


@pytest.fixture(scope="module")
def http():
    config = ServerConfig(api_key=("key",), max_body_bytes=4096)
    with EchoServer(config) as server:
        with httpx2.Client(base_url=server.url, headers=HEADERS) as client:
            yield client


def send(http: httpx2.Client, **body) -> dict:
    response = http.post("/v1/messages", json={"messages": HI, "max_tokens": 7, **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx2.Client, **body) -> list[dict]:
    asked = {"messages": HI, "max_tokens": 3, "stream": True, **body}
    response = http.post("/v1/messages", json=asked)
    *blocks, nothing = response.text.split("\n\n")
    assert nothing == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def refused(response: httpx2.Response, status: int) -> tuple[str, str]:
    """Returns the error's type and message; asserts the envelope."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    return body["error"]["type"], body["error"]["message"]


def test_a_message_has_anthropics_form(http):
    message = send(http, metadata={"user_id": "me"})
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "echo",
        "content": [{"type": "text", "text": "u:hi;a:", "citations": None}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 7,
            "output_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


def test_a_stop_sequence_is_named(http):
    message = send(http, stop_sequences=["zz", ";"], temperature=0, top_k=1)
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", ";")
    assert message["content"][0]["text"] == "u:hi"


def test_a_full_context_is_not_called_max_tokens(http):
    message = send(http, messages=[{"role": "user", "content": "a" * 120}], max_tokens=100)
    assert message["stop_reason"] == "model_context_window_exceeded"


def test_the_system_prompt_and_blocks_become_the_conversation(http):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
        {"role": "user", "content": "d"},
    ]
    system = [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]
    said = "s:s;u:a\nb;a:c;u:d;a:"
    message = send(http, messages=messages, system=system, max_tokens=len(said))
    assert message["content"][0]["text"] == said


def test_the_assistants_last_turn_is_continued(http):
    messages = [*HI, {"role": "assistant", "content": "yes"}]
    assert send(http, messages=messages, max_tokens=10)["content"][0]["text"] == "u:hi;a:yes"


def test_a_stream_sends_every_event_in_order(http):
    events = stream(http)
    kinds = list(dict.fromkeys(event["type"] for event in events))
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["input_tokens"]) == ([], None, 7)
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    assert "".join(event["delta"]["text"] for event in deltas) == "u:h"
    assert {(event["index"], event["delta"]["type"]) for event in deltas} == {(0, "text_delta")}
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 3


def test_tokens_are_counted_as_the_message_counts_them(http):
    asked = {"messages": HI, "system": "be brief"}
    counted = http.post("/v1/messages/count_tokens", json=asked).json()
    assert counted == {"input_tokens": send(http, **asked)["usage"]["input_tokens"]}
    assert counted["input_tokens"] == len("s:be brief;u:hi;a:")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 999}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages.0.content.0.type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages.0.content.0.tool_use_id",
        ),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, "messages"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(http, body, param):
    response = http.post("/v1/messages", json={"messages": HI, "max_tokens": 7, **body})
    kind, message = refused(response, 400)
    assert kind == "invalid_request_error"
    assert message.startswith(param)


def test_errors_in_front_of_the_route_have_anthropics_form(http):
    body = {"messages": HI, "max_tokens": 1}
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        stranger = http.post(path, json=body, headers={"x-api-key": "wrong"})
        assert refused(stranger, 401)[0] == "authentication_error"
        assert refused(http.post(path, content=b"x" * 5000), 413)[0] == "request_too_large"
        assert refused(http.post(path, content=b"x"), 415)[0] == "invalid_request_error"
        assert refused(http.get(path), 405)[0] == "invalid_request_error"
    assert refused(http.post("/v1/messages", json=body | {"model": "gpt"}), 404)[0] == (
        "not_found_error"
    )
    elsewhere = http.post("/v1/chat/completions", json=body, headers={"x-api-key": "wrong"})
    assert elsewhere.json()["error"]["code"] == 401


def test_a_full_queue_is_told_as_a_rate_limit():
    with EchoServer(max_waiting=0) as server, httpx2.Client(base_url=server.url) as http:
        response = http.post("/v1/messages", json={"messages": HI, "max_tokens": 1})
        assert refused(response, 429)[0] == "rate_limit_error"
        assert response.headers["retry-after"]
        server.state.is_draining = True
        response = http.post("/v1/messages", json={"messages": HI, "max_tokens": 1})
        assert refused(response, 503)[0] == "overloaded_error"


def test_an_engine_that_dies_is_an_error_event():
    engine = {"dies_at": ord("h"), "step_s": 0.05}
    with EchoServer(**engine) as server, httpx2.Client(base_url=server.url) as http:
        last = stream(http)[-1]
        assert last["type"] == "error" and last["error"]["type"] == "api_error"
