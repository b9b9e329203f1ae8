"""/v1/chat/completions over a real socket, and the official client against both endpoints."""

import json

import httpx2
import openai
import pytest

from tests.server.serving import EchoServer

HI = [{"role": "user", "content": "hi"}]  # renders as u:hi;a:


@pytest.fixture(scope="module")
def server():
    with EchoServer() as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with httpx2.Client(base_url=server.url) as client:
        yield client


def chat(http: httpx2.Client, **body) -> dict:
    response = http.post("/v1/chat/completions", json={"messages": HI, **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx2.Client, **body) -> list[dict]:
    response = http.post("/v1/chat/completions", json={"messages": HI, "stream": True, **body})
    *events, done, nothing = response.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_chat_completion_has_the_openai_form(http):
    reply = chat(http, max_completion_tokens=7, max_tokens=1)
    assert reply["id"].startswith("chatcmpl-")
    assert reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "u:hi;a:"
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["prompt_tokens"] == 7


def test_the_answer_fills_the_context_by_default(http):
    assert chat(http)["usage"]["total_tokens"] == 128


def test_special_tokens_typed_by_a_client_stay_text_with_add_special_tokens(http):
    messages = [{"role": "user", "content": "<|end|>"}]
    for add in (False, True):
        reply = chat(
            http, messages=messages, max_tokens=1, add_special_tokens=add, return_token_ids=True
        )
        assert reply["prompt_token_ids"] == list(b"u:<|end|>;a:")


def test_text_parts_and_missing_content_are_accepted(http):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system"}, {"role": "user", "content": parts}]
    content = chat(http, messages=messages, max_tokens=9)["choices"][0]["message"]["content"]
    assert content == "s:;u:a\nb;"


def test_the_final_message_can_be_continued(http):
    reply = chat(
        http,
        messages=[*HI, {"role": "assistant", "content": "yes"}],
        add_generation_prompt=False,
        continue_final_message=True,
        max_tokens=10,
    )
    assert reply["choices"][0]["message"]["content"] == "u:hi;a:yes"


def test_chat_logprobs_have_exactly_the_number_asked_for(http):
    content = chat(http, max_tokens=2, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    assert [entry["token"] for entry in content["content"]] == ["u", ":"]
    assert content["content"][0]["bytes"] == [117]
    assert [entry["logprob"] for entry in content["content"][0]["top_logprobs"]] == [-1.0, -2.0]
    bare = chat(http, max_tokens=1, logprobs=True)["choices"][0]["logprobs"]["content"][0]
    assert bare["top_logprobs"] == []


def test_a_chat_stream_begins_with_the_role_of_each_choice(http):
    events = stream(http, n=2, max_tokens=4, stream_options={"include_usage": True})
    usage = events.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8
    for index in (0, 1):
        deltas = [e["choices"][0]["delta"] for e in events if e["choices"][0]["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta["content"] for delta in deltas) == "u:hi"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_the_openai_client_reads_every_kind_of_reply(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["echo", "alias"]
        assert client.models.retrieve("alias").id == "alias"
        text = client.completions.create(model="echo", prompt="hello", max_tokens=5)
        assert text.choices[0].text == "hello"
        reply = client.chat.completions.create(model="echo", messages=HI, max_tokens=4)
        assert reply.choices[0].message.content == "u:hi"
        chunks = client.chat.completions.create(
            model="echo", messages=HI, max_tokens=4, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "u:hi"
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model="gpt", messages=HI)
        assert refused.value.param == "model"


@pytest.mark.anyio
async def test_the_async_openai_client_streams(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        chunks = await client.completions.create(
            model="echo", prompt="hello", max_tokens=10, stream=True
        )
        assert "".join([chunk.choices[0].text async for chunk in chunks]) == "hellohello"


LONG = "word " * 50_000


@pytest.mark.parametrize("content", [LONG, [{"type": "text", "text": LONG}]], ids=["text", "parts"])
def test_a_long_conversation_is_refused_before_all_of_it_is_encoded(http, content):
    body = {"messages": [{"role": "user", "content": content}]}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert "at least" in error["message"] and error["param"] == "messages"
