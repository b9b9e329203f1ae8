"""/v1/responses over a real socket: its form, its events, what is kept, what is refused."""

import json

import httpx2
import openai
import pytest

from jaxserve.config import ServerConfig
from tests.server.serving import EchoServer


@pytest.fixture(scope="module")
def server():
    config = ServerConfig(max_stored_responses=3)
    with EchoServer(config) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with httpx2.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


def respond(http: httpx2.Client, **body) -> dict:
    response = http.post("/v1/responses", json={"input": "hi", "max_output_tokens": 7, **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx2.Client, **body) -> list[dict]:
    asked = {"input": "hi", "max_output_tokens": 3, "stream": True, **body}
    response = http.post("/v1/responses", json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, nothing = response.text.split("\n\n")
    assert nothing == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def refused(http: httpx2.Client, status: int = 400, **body) -> str | None:
    response = http.post("/v1/responses", json={"input": "hi", **body})
    assert response.status_code == status, response.text
    return response.json()["error"]["param"]


def text_of(response: dict) -> str:
    (message,) = response["output"]
    (part,) = message["content"]
    return part["text"]


def test_a_response_has_the_openai_form(http):
    response = respond(http, metadata={"a": "b"}, temperature=0.5, user="me")
    assert response["id"].startswith("resp_") and response["object"] == "response"
    (message,) = response["output"]
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert message["status"] == response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert message["content"] == [
        {"text": "u:hi;a:", "annotations": [], "logprobs": [], "type": "output_text"}
    ]
    assert response["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 14,
    }
    assert response["metadata"] == {"a": "b"}
    assert (response["temperature"], response["user"]) == (0.5, "me")


def test_a_stop_string_completes_a_response(http):
    response = respond(http, stop=";")
    assert (response["status"], text_of(response)) == ("completed", "u:hi")
    assert response["incomplete_details"] is None and response["completed_at"]


def test_instructions_and_items_become_the_conversation(http):
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "c"}]},
        {"type": "message", "role": "user", "content": "d"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "e"}]},
        {"role": "user", "content": "f"},
    ]
    response = respond(http, input=items, instructions="b", max_output_tokens=21)
    assert text_of(response) == "s:b\n\nc;u:d;a:e;u:f;a:"


def test_a_stream_sends_every_event_in_order(http):
    events = stream(http)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    said = [event for event in events if event["type"] == "response.output_text.delta"]
    item_id = events[-1]["response"]["output"][0]["id"]
    assert "".join(event["delta"] for event in said) == "u:h"
    assert {(e["item_id"], e["output_index"], e["content_index"]) for e in said} == {
        (item_id, 0, 0)
    }
    assert events[0]["response"]["status"] == "in_progress" and not events[0]["response"]["output"]
    assert text_of(events[-1]["response"]) == "u:h"


def test_logprobs_come_when_they_are_included(http):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    (message,) = respond(http, max_output_tokens=2, **asked)["output"]
    logprobs = message["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == ["u", ":"]
    assert logprobs[0]["top_logprobs"] == [{"token": "u", "logprob": -1.0, "bytes": [117]}]
    deltas = [e for e in stream(http, **asked) if e["type"] == "response.output_text.delta"]
    assert [entry["token"] for e in deltas for entry in e["logprobs"]] == ["u", ":", "h"]


def test_a_response_goes_on_from_an_earlier_one(http):
    first = respond(http, instructions="x", max_output_tokens=1)
    second = respond(
        http, input="yo", previous_response_id=first["id"], max_output_tokens=3, stop=";"
    )
    assert second["previous_response_id"] == first["id"]
    third = respond(http, input="z", previous_response_id=second["id"], max_output_tokens=37)
    # The instructions are not carried over; what was said is.
    assert text_of(third) == "u:hi;a:s;u:yo;a:u:h;u:z;a:u:hi;a:s;u:"


def test_a_stored_response_can_be_read_and_deleted(http):
    response = respond(http)
    path = f"/v1/responses/{response['id']}"
    assert http.get(path).json() == response
    assert http.post(f"{path}/cancel").json()["error"]["param"] == "response_id"
    assert http.get(path, params={"stream": "true"}).status_code == 400
    assert http.delete(path).json() == {
        "id": response["id"],
        "object": "response",
        "deleted": True,
    }
    for gone in (http.get(path), http.post(f"{path}/cancel"), http.delete(path)):
        assert gone.status_code == 404
        assert gone.json()["error"]["param"] == "response_id"
    assert refused(http, 404, previous_response_id=response["id"]) == "previous_response_id"


def test_a_response_that_is_not_stored_cannot_be_read(http):
    response = respond(http, store=False)
    assert response["store"] is False
    assert http.get(f"/v1/responses/{response['id']}").status_code == 404


def test_the_store_keeps_the_responses_used_last(http):
    ids = [respond(http)["id"] for _ in range(3)]
    assert http.get(f"/v1/responses/{ids[0]}").status_code == 200
    respond(http)
    found = [http.get(f"/v1/responses/{name}").status_code for name in ids]
    assert found == [200, 404, 200]


def test_a_streamed_response_is_stored_too(http):
    last = stream(http)[-1]["response"]
    assert http.get(f"/v1/responses/{last['id']}").json() == last


def test_truncation_drops_the_oldest_turns(http):
    items = [{"role": "user", "content": letter * 30} for letter in "abcdef"]
    assert refused(http, input=items) == "input"
    response = respond(http, input=items, instructions="k", truncation="auto", max_output_tokens=20)
    # 128 tokens of context, less the 20 of the answer: three turns of 33 no longer fit.
    assert response["usage"]["input_tokens"] == len("s:k;") + 3 * 33 + len("a:")
    assert refused(http, input="g" * 200, truncation="auto") == "input"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input.0.type"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input.0.role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.call_id"),
        (
            {"input": [{"type": "reasoning", "encrypted_content": "?"}]},
            "input.0.encrypted_content",
        ),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 99}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 999}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"truncation": "some"}, "truncation"),
        ({"metadata": {"a": "b" * 600}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"max_tool_calls": 10**30}, "max_tool_calls"),
        ({"text": {"format": {"type": "json_schema", "schema": {"maximum": 10**30}}}}, "text"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tool_choice": {"type": "custom", "name": "a"}}, "tool_choice"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(http, body, param):
    assert refused(http, **body) == param


def test_a_server_without_a_store_says_so():
    config = ServerConfig(max_stored_responses=0)
    with EchoServer(config) as server, httpx2.Client(base_url=server.url) as http:
        assert respond(http)["store"] is False
        assert refused(http, store=True) == "store"
        assert refused(http, 404, previous_response_id="resp_1") == "previous_response_id"


def test_a_response_larger_than_the_store_is_not_kept():
    config = ServerConfig(max_stored_response_bytes=100)
    with EchoServer(config) as server, httpx2.Client(base_url=server.url) as http:
        assert http.get(f"/v1/responses/{respond(http)['id']}").status_code == 404


def test_an_engine_that_dies_fails_the_stream():
    with (
        EchoServer(dies_at=ord("h"), step_s=0.05) as server,
        httpx2.Client(base_url=server.url) as http,
    ):
        last = stream(http)[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["code"] == "server_error"


def test_the_openai_client_reads_every_kind_of_response(client):
    response = client.responses.create(model="echo", input="hi", max_output_tokens=4)
    assert response.output_text == "u:hi"
    assert client.responses.retrieve(response.id) == response
    with client.responses.stream(
        model="echo",
        input="yo",
        extra_body={"stop": ";"},
        previous_response_id=response.id,
    ) as events:
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert text == events.get_final_response().output_text == "u:hi"
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
