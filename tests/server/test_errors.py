"""What is refused, with which status, and which field the answer names."""

import time

import httpx2
import pytest

from jaxserve import errors
from jaxserve.config import ServerConfig
from tests.server.serving import EchoServer

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def http():
    with EchoServer() as server, httpx2.Client(base_url=server.url) as client:
        yield client


def refused(response: httpx2.Response, status: int) -> dict:
    """Returns the error object; asserts the envelope."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, [2, True]]}, "prompt.1.1"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": "x" * 128}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"prompt": "a", "n": -1}, "n"),
        ({"prompt": "a", "n": 129}, "n"),
        ({"prompt": "a", "n": "1"}, "n"),
        ({"prompt": "a", "n": True}, "n"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "min_p": -1}, "min_p"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 129}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 20}, "min_tokens"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stop": "x" * 2000}, "stop"),
        ({"prompt": "a", "stop": [1]}, "stop.0"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logprobs": -2}, "logprobs"),
        ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": "a", "logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"prompt": "a", "logprobs": 1, "logprob_token_ids": [256]}, "logprob_token_ids"),
        (
            {"prompt": "a", "logprobs": 1, "logprob_token_ids": [*range(21)]},
            "logprob_token_ids",
        ),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "a", "truncate_prompt_tokens": 113}, "truncate_prompt_tokens"),
        ({"prompt": "a", "truncation_side": "middle"}, "truncation_side"),
        ({"prompt": "a", "stream": True, "stream_interval": 0}, "stream_interval"),
        (
            {"prompt": "a", "repetition_detection": {"max_pattern_size": 300}},
            "repetition_detection",
        ),
        ({"prompt": "a", "vllm_xargs": {"a": 1}}, "vllm_xargs"),
        ({"prompt": "a", "kv_transfer_params": {}}, "kv_transfer_params"),
        ({"prompt": "a", "thinking_token_budget": 5}, "thinking_token_budget"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": "much"}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
        ({"prompt": "a", "allowed_token_ids": [99999]}, "allowed_token_ids"),
        ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "a", "cache_salt": "a/b"}, "cache_salt"),
        ({"prompt": "a", "priority": 2**63}, "priority"),
        ({"prompt": "a", "priority": 1}, "priority"),
        ({"prompt": ["a"] * 9, "n": 128}, "n"),
        ({"prompt": "a", "request_id": "a b"}, "request_id"),
        ({"prompt": "a", "suffix": "end"}, "suffix"),
        ({"prompt": "a", "suffix": "end", "echo": True}, "suffix"),
        ({"prompt": "a", "use_beam_search": True, "stream": True}, "stream"),
        ({"prompt": "a", "use_beam_search": True, "top_k": 5}, "top_k"),
        ({"prompt": "a", "use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"prompt": "a", "use_beam_search": True, "stop": "x"}, "stop"),
        (
            {"prompt": "a", "use_beam_search": True, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        ({"prompt": "a", "use_beam_search": True, "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "use_beam_search": True, "n": 11}, "n"),
        ({"prompt": "a", "use_beam_search": True, "length_penalty": 200}, "length_penalty"),
        ({"prompt": "a", "length_penalty": 2}, "length_penalty"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "a", "guided_json": {}}, "guided_json"),
    ],
)
def test_a_bad_completion_names_its_field(http, body, param):
    assert refused(http.post("/v1/completions", json=body), 400)["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HI, "logprobs": 5}, "logprobs"),
        ({"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": HI, "max_completion_tokens": 129}, "max_completion_tokens"),
        ({"messages": HI, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HI, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": HI, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"messages": HI, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
        ({"messages": HI, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"messages": HI, "continue_final_message": True}, "continue_final_message"),
        ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": HI, "truncate_prompt_tokens": 200}, "truncate_prompt_tokens"),
        ({"messages": HI, "logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"messages": HI, "priority": -1}, "priority"),
    ],
)
def test_a_bad_chat_request_names_its_field(http, body, param):
    assert refused(http.post("/v1/chat/completions", json=body), 400)["param"] == param


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ('{"prompt": "a", "temperature": NaN}', "temperature"),
        ('{"prompt": "a", "temperature": -Infinity}', "temperature"),
        ('{"prompt": "a", "temperature": 1e999}', "temperature"),
        ('{"prompt": "a"', None),
        ("", None),
        ("[]", None),
        ("nothing", None),
        ('{"prompt": "\\ud800"}', None),
        ('{"prompt": "a", "x": ' + "[" * 64 + "]" * 64 + "}", None),
        ('{"prompt": "a", "x": ' + "[" * 5000 + "]" * 5000 + "}", None),
    ],
)
def test_malformed_json_is_a_400(http, text, param):
    headers = {"content-type": "application/json"}
    response = http.post("/v1/completions", content=text.encode(), headers=headers)
    assert refused(response, 400)["param"] == param


def test_brackets_inside_strings_do_not_nest(http):
    body = {"prompt": "[" * 100, "x": ['\\"[[{'] * 100, "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200


def test_a_refusal_takes_less_than_50_ms(http):
    times_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        refused(http.post("/v1/completions", json={"prompt": "hello " * 100_000}), 400)
        times_s.append(time.perf_counter() - start_s)
    assert min(times_s) < 0.05


def test_an_unknown_model_is_a_404_that_lists_the_known_ones(http):
    error = refused(http.post("/v1/completions", json={"model": "gpt", "prompt": "a"}), 404)
    assert (error["type"], error["param"]) == ("not_found_error", "model")
    assert "echo, alias" in error["message"]
    assert refused(http.get("/v1/models/gpt"), 404)["param"] == "model"


def test_unknown_paths_and_methods_have_the_same_envelope(http):
    assert refused(http.get("/nothing"), 404)["type"] == "not_found_error"
    response = http.get("/v1/completions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"


def test_the_body_must_be_json(http):
    assert refused(http.post("/v1/completions", data={"prompt": "a"}), 415)


def test_a_content_type_with_parameters_is_json(http):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    response = http.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert response.status_code == 200


def test_a_large_body_is_a_413_announced_or_not():
    config = ServerConfig(max_body_bytes=1000)
    with EchoServer(config) as server, httpx2.Client(base_url=server.url) as http:
        refused(http.post("/v1/completions", json={"prompt": "x" * 1000}), 413)
        chunks = (b"x" * 600 for _ in range(2))
        headers = {"content-type": "application/json"}
        refused(http.post("/v1/completions", content=chunks, headers=headers), 413)


def test_more_samples_than_the_engine_ever_holds_are_refused_for_good():
    with EchoServer(max_waiting=1) as server, httpx2.Client(base_url=server.url) as http:
        body = {"prompt": "a", "n": 66, "max_tokens": 1}
        error = refused(http.post("/v1/completions", json=body), 400)
    assert error["param"] == "n"
    assert "66 sequences are asked for at once; the limit is 65" in error["message"]


def test_a_full_queue_is_a_429_with_retry_after():
    with EchoServer(max_waiting=1) as server, httpx2.Client(base_url=server.url) as http:
        body = {"prompt": ["a", "b"], "stream": True}
        response = http.post("/v1/completions", json=body)
        assert refused(response, 429)["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/nothing"])
def test_everything_but_the_probes_needs_the_key(path):
    config = ServerConfig(api_key=("först", "second"))
    with EchoServer(config) as server, httpx2.Client(base_url=server.url) as http:
        for probe in ("/health", "/ready", "/ping"):
            assert http.get(probe).status_code == 200
        response = http.get(path)
        assert refused(response, 401)["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"
        refused(http.get(path, headers={"authorization": "Bearer wrong"}), 401)
        refused(http.get(path, headers={"host": "x/health?", "authorization": "Basic x"}), 401)
        for headers in ({"authorization": "bearer second"}, {"x-api-key": "second"}):
            assert http.get(path, headers=headers).status_code in (200, 404)
        bearer = {"authorization": "Bearer först".encode()}
        assert http.get(path, headers=bearer).status_code in (200, 404)


def slow_body():
    yield b'{"prompt": '
    time.sleep(0.6)
    yield b'"a"}'


JSON = {"content-type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def strict():
    config = ServerConfig(api_key=("k",), max_body_bytes=2000, body_timeout_s=0.3)
    with (
        EchoServer(config, max_waiting=1) as server,
        httpx2.Client(base_url=server.url, headers={"x-api-key": "k"}, timeout=30) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "kind", "param", "message"),
    [
        (
            "POST", COMPLETIONS, {"content": b"{", "headers": JSON},
            400, "invalid_request_error", None, "the body is not valid JSON",
        ),
        (
            "POST", COMPLETIONS, {"json": {"prompt": "a", "n": "1"}},
            400, "invalid_request_error", "n", "n: Expected `int | null`, got `str`",
        ),
        (
            "POST", COMPLETIONS, {"json": {"prompt": "a", "temperature": 2.5}},
            400, "invalid_request_error", "temperature", "temperature is 2.5; it must be in [0, 2]",
        ),
        (
            "POST", COMPLETIONS, {"json": {"prompt": "a", "logprobs": 21}},
            400, "invalid_request_error", "logprobs", "logprobs is 21; the limit is 20",
        ),
        (
            "POST", COMPLETIONS, {"json": {"prompt": "x" * 200}},
            400, "invalid_request_error", "prompt",
            "the prompt has 200 tokens; the model's context holds 128",
        ),
        (
            "POST", CHAT, {"json": {"messages": [{"role": "user", "content": "x" * 200}]}},
            400, "invalid_request_error", "messages",
            "the prompt has 205 tokens; the model's context holds 128",
        ),
        (
            "POST", CHAT, {"json": {"messages": []}},
            400, "invalid_request_error", "messages", "messages is empty",
        ),
        (
            "POST", COMPLETIONS, {"json": {"prompt": "a", "best_of": 3}},
            400, "invalid_request_error", "best_of", "best_of is not supported by this server",
        ),
        (
            "POST", COMPLETIONS, {"json": {"prompt": "a"}, "headers": {"x-api-key": "wrong"}},
            401, "authentication_error", None, "the API key is wrong",
        ),
        (
            "POST", COMPLETIONS, {"json": {"prompt": "a", "model": "gpt"}},
            404, "not_found_error", "model", "no model is named 'gpt'; served: echo, alias",
        ),
        ("GET", "/v2", {}, 404, "not_found_error", None, "there is nothing at /v2"),
        (
            "GET", CHAT, {},
            405, "invalid_request_error", None, "/v1/chat/completions does not take GET",
        ),
        (
            "POST", COMPLETIONS, {"content": slow_body, "headers": JSON},
            408, "invalid_request_error", None, "the body did not arrive within 0.3 s",
        ),
        (
            "POST", COMPLETIONS, {"json": {"prompt": "x" * 3000}},
            413, "invalid_request_error", None, "the limit is 2000",
        ),
        (
            "POST", COMPLETIONS, {"content": b"{}", "headers": {"content-type": "text/plain"}},
            415, "invalid_request_error", None, "content-type is 'text/plain'; it must be",
        ),
        (
            "POST", COMPLETIONS, {"json": {"prompt": ["a", "b"]}},
            429, "rate_limit_error", None, "requests wait already",
        ),
    ],
)  # fmt: skip
def test_every_refusal_has_its_status_type_param_and_message(
    strict, method, path, request_, status, kind, param, message
):
    content = request_.get("content")
    given = {**request_, "content": content()} if callable(content) else request_
    error = refused(strict.request(method, path, **given), status)
    assert (error["type"], error["param"]) == (kind, param)
    assert message in error["message"]


def test_every_4xx_of_the_server_is_among_the_refusals_above():
    mark = test_every_refusal_has_its_status_type_param_and_message.pytestmark[0]
    tested = {row[3] for row in mark.args[1]}
    known = {
        cls.status
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.RequestError)
    }
    assert tested == known
