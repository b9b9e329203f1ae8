"""The command line's server on the demo's real weights, over a socket."""

import json
import signal
import sys

import jsonschema
import openai
import pytest

from tests.server.processes import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-m", "jaxserve", "serve", "demo", "--port", "0"]
    with running([*command, "--max-model-len", "512", "--max-num-seqs", "4"]) as server:
        server.wait_ready(600)
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:
        yield client


def test_the_demo_knows_the_capital_of_france(client):
    reply = client.completions.create(
        model="demo", prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert "Paris" in reply.choices[0].text
    assert reply.usage is not None and reply.usage.completion_tokens == 8


def test_a_streamed_chat_is_the_answer_of_the_unstreamed_one(client):
    asked = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What is two plus two?"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = client.chat.completions.create(**asked, stream=True)
    assert whole
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_a_seed_fixes_the_answer(client):
    asked = {"model": "demo", "prompt": "Once", "max_tokens": 12, "seed": 7, "temperature": 1.0}
    texts = {client.completions.create(**asked).choices[0].text for _ in range(2)}
    assert len(texts) == 1


def test_the_echoed_prompt_is_scored(client):
    reply = client.completions.create(
        model="demo", prompt="The capital of France is", max_tokens=0, echo=True, logprobs=1
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == "The capital of France is"
    assert all(value < 0 for value in (logprobs.token_logprobs or ())[1:])


def test_an_answer_keeps_to_its_schema(client):
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "population": {"type": "integer", "minimum": 0, "maximum": 100_000_000},
        },
        "required": ["city", "population"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Name a city and its population, in JSON."}],
        max_tokens=80,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    assert reply.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(reply.choices[0].message.content), schema)


def test_sigterm_ends_the_server_with_0(server):
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
