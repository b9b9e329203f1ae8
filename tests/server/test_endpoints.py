"""The small endpoints: tokens, SageMaker's door, batches of chats, the API's own description."""

import re

import httpx2
import pytest
from starlette.routing import Route

from jaxserve import errors
from jaxserve.config import ServerConfig
from jaxserve.server.app import http_app
from jaxserve.server.openapi import ERRORS
from tests.server.serving import EchoServer

HI = [{"role": "user", "content": "hi"}]  # renders as u:hi;a:


@pytest.fixture(scope="module")
def server():
    with EchoServer(ServerConfig(enable_tokenizer_info_endpoint=True)) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with httpx2.Client(base_url=server.url) as client:
        yield client


def refused(response: httpx2.Response, status: int = 400) -> tuple[str, str]:
    """Returns the param and the message of an error."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (status, "invalid_request_error")
    return error["param"], error["message"]


def test_a_prompt_is_tokenized(http):
    reply = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert reply == {
        "count": 3, "max_model_len": 128, "tokens": [*"hé".encode()],
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }  # fmt: skip
    assert http.post("/tokenize", json={"prompt": "x" * 500}).json()["count"] == 500


def test_messages_are_tokenized_as_chat_would(http):
    reply = http.post("/tokenize", json={"messages": HI}).json()
    assert bytes(reply["tokens"]) == b"u:hi;a:"
    assert reply["token_strs"] is None
    body = {"messages": HI, "add_generation_prompt": False}
    assert bytes(http.post("/tokenize", json=body).json()["tokens"]) == b"u:hi;"


def test_tokens_become_text_again(http):
    body = {"tokens": [104, 105, 257, 2**62]}
    assert http.post("/detokenize", json=body).json() == {"prompt": "hi<eos>"}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_the_tokenizer_describes_itself(http):
    reply = http.get("/tokenizer_info").json()
    assert (reply["bos_token"], reply["eos_token"]) == ("<bos>", "<eos>")
    assert reply["chat_template"].startswith("{% for")
    assert reply["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt", "either prompt or messages"),
        ("/tokenize", {"messages": []}, "messages", "empty"),
        ("/tokenize", {"messages": HI, "chat_template": "x"}, "chat_template", "--trust-request"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "-1"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0", "int"),
        ("/invocations", {"input": "a"}, "messages", "neither messages nor prompt"),
        ("/v1/chat/completions/batch", {"messages": []}, "messages", "0 conversations"),
        ("/v1/chat/completions/batch", {"messages": [[]]}, "messages", "empty"),
        ("/v1/chat/completions/batch", {"messages": HI}, "messages.0", "array"),
        ("/v1/chat/completions/batch", {"messages": [HI], "n": 2}, "n", "batch"),
        ("/v1/chat/completions/batch", {"messages": [HI], "stream": True}, "stream", "batch"),
        (
            "/v1/chat/completions/batch",
            {"messages": [HI], "use_beam_search": True},
            "use_beam_search",
            "batch",
        ),
    ],
)
def test_a_bad_body_names_its_field(http, path, body, param, message):
    named, text = refused(http.post(path, json=body))
    assert named == param
    assert message in text


def test_an_invocation_is_a_chat_or_a_completion(http):
    reply = http.post("/invocations", json={"prompt": "hi", "max_tokens": 2}).json()
    assert (reply["object"], reply["choices"][0]["text"]) == ("text_completion", "hi")
    reply = http.post("/invocations", json={"messages": HI, "max_tokens": 4}).json()
    assert reply["choices"][0]["message"]["content"] == "u:hi"
    body = {"prompt": "hi", "max_tokens": 2, "stream": True}
    assert http.post("/invocations", json=body).text.endswith("data: [DONE]\n\n")
    assert refused(http.post("/invocations", json={"prompt": "a", "n": 0}))[0] == "n"


def test_a_batch_has_a_choice_for_each_conversation(http):
    body = {"messages": [HI, [{"role": "user", "content": "you"}]], "max_tokens": 5}
    reply = http.post("/v1/chat/completions/batch", json=body).json()
    assert [(c["index"], c["message"]["content"]) for c in reply["choices"]] == [
        (0, "u:hi;"),
        (1, "u:you"),
    ]
    assert reply["usage"]["completion_tokens"] == 10


def test_load_counts_what_runs(server, http):
    assert http.get("/load").json() == {"server_load": 0}
    server.link.engine._step_s = 0.02
    body = {"prompt": "hello", "max_tokens": 100, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        chunks = response.iter_text()
        next(chunks)
        assert http.get("/load").json() == {"server_load": 1}
    server.link.engine._step_s = 0.0


def test_every_route_is_described(server, http):
    described = http.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    for route in http_app(server.state).routes:
        assert isinstance(route, Route)
        operations = described["paths"][route.path.replace(":path", "")]
        for method in route.methods - {"HEAD"}:
            operation = operations[method.lower()]
            assert operation["summary"].endswith(".")
            has_body = method == "POST" and not route.path.endswith(("/ping", "/cancel"))
            assert ("requestBody" in operation) == has_body
    assert "security" not in described


def test_the_description_resolves_and_knows_the_fields(http):
    described = http.get("/openapi.json")
    schemas = described.json()["components"]["schemas"]
    for name in set(re.findall(r'"#/components/schemas/([^"]+)"', described.text)):
        assert name in schemas
    fields = schemas["CompletionRequest"]["properties"]
    assert {"prompt", "echo", "temperature", "use_beam_search"} <= fields.keys()
    assert schemas["ChatRequest"]["required"] == ["messages"]
    error = schemas["ErrorObject"]
    assert error["required"] == ["message", "type", "param", "code"]


def test_every_error_of_a_request_is_described():
    known = {error.status for error in ERRORS}
    raised = {
        cls.status
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.JaxserveError)
    }
    assert known == raised


def test_the_docs_page_needs_nothing_from_elsewhere(http):
    response = http.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "openapi.json" in response.text
    assert not re.search(r"(src|href)=.?https?:|//cdn|@import", response.text)


def test_docs_and_tokenizer_info_can_be_left_out():
    with (
        EchoServer(ServerConfig(disable_docs=True, api_key=("k",))) as server,
        httpx2.Client(base_url=server.url, headers={"authorization": "Bearer k"}) as http,
    ):
        for path in ("/docs", "/openapi.json", "/tokenizer_info"):
            assert http.get(path).status_code == 404
            assert httpx2.get(server.url + path).status_code == 401
