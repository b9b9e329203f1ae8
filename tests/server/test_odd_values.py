"""Every field of every body with values that nobody expects: refused by name, never a 500."""

import itertools

import httpx2
import pytest

from jaxserve.config import ServerConfig
from jaxserve.server.chat_batch import ChatBatchRequest
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.protocol.completions import CompletionRequest
from jaxserve.server.protocol.messages import MessageRequest
from jaxserve.server.protocol.responses import ResponseRequest
from jaxserve.server.protocol.tokenization import DetokenizeRequest, TokenizeRequest
from tests.server.serving import EchoServer

HI = [{"role": "user", "content": "hi"}]
ODD_VALUES = [
    None, True, False, 0, 1, -1, 2, 21, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308,
    "", "a", "\x00", "😀", "../..", [], [0], [-1], [2**40], [""], ["a"], [None], [[]], [[1]], [{}],
    {}, {"a": 1}, {"1": 1.5}, {"-1": 0}, {"type": "text"}, {"type": None}, HI, [HI],
    [{"role": "user"}], [{"role": 1, "content": {}}], [{"role": "t", "content": [{"type": "x"}]}],
    {"include_usage": True}, {"max_pattern_size": 3, "min_count": 2}, {"min_count": 1},
]  # fmt: skip
ENDPOINTS = {
    "/v1/completions": (CompletionRequest, {"prompt": "hi", "max_tokens": 1}),
    "/v1/chat/completions": (ChatRequest, {"messages": HI, "max_tokens": 1}),
    "/v1/chat/completions/batch": (ChatBatchRequest, {"messages": [HI], "max_tokens": 1}),
    "/v1/responses": (ResponseRequest, {"input": "hi", "max_output_tokens": 1}),
    "/v1/messages": (MessageRequest, {"messages": HI, "max_tokens": 1}),
    "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}


@pytest.fixture(scope="module")
def http():
    config = ServerConfig(trust_request_chat_template=True)
    with EchoServer(config) as server, httpx2.Client(base_url=server.url) as client:
        yield client


def check(response: httpx2.Response, field: str, value: object) -> None:
    if response.status_code == 200:
        return
    told = f"{field}={value!r}: {response.text}"
    # What does not exist is the one refusal that is no 400.
    has_names = field in ("model", "previous_response_id")
    assert response.status_code in ((400, 404) if has_names else (400,)), told
    error = response.json()["error"]
    assert error["message"], told
    if response.json().get("type") == "error":  # Anthropic's form, which has the message alone
        return
    named = error["param"]
    assert isinstance(named, str), told


@pytest.mark.parametrize("path", ENDPOINTS)
def test_no_value_of_any_field_breaks_the_server(http, path):
    kind, body = ENDPOINTS[path]
    # Each odd template costs a process, and is told apart by nothing but its text.
    fields = [name for name in kind.__struct_fields__ if name != "chat_template"]
    for field, value in itertools.product(fields, ODD_VALUES):
        check(http.post(path, json={**body, field: value}), field, value)
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_pair_of_options_breaks_the_server(http, path):
    _, body = ENDPOINTS[path]
    options = {
        "n": 2, "stream": True, "logprobs": 1 if "chat" not in path else True, "echo": True,
        "use_beam_search": True, "prompt_logprobs": 1, "stop": "h", "min_tokens": 1, "seed": -1,
        "temperature": 0, "truncate_prompt_tokens": 1, "logprob_token_ids": [1], "suffix": "x",
        "repetition_detection": {"max_pattern_size": 1}, "stream_interval": 3, "max_tokens": 0,
        "return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True,
        "logit_bias": {"1": -1}, "allowed_token_ids": [104], "bad_words": ["q"], "priority": 0,
        "include_stop_str_in_output": True, "return_prompt_text": True, "add_special_tokens": True,
    }  # fmt: skip
    for first, second in itertools.combinations(options, 2):
        response = http.post(path, json={**body, first: options[first], second: options[second]})
        check(response, f"{first}, {second}", "")
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n"), (first, second)
