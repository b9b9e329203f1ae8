"""Request fields beyond OpenAI's: each test fails when its field is ignored."""

import dataclasses
import itertools
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from jaxserve.config import ServerConfig
from tests.fakes import byte_tokenizer
from tests.server.serving import EchoServer

HI = [{"role": "user", "content": "hi"}]  # renders as u:hi;a:


@pytest.fixture(scope="module")
def server():
    config = ServerConfig(
        enable_request_id_headers=True,
        trust_request_chat_template=True,
        sse_keep_alive_interval=0.05,
    )
    with EchoServer(config) as server:
        yield server


@pytest.fixture(scope="module")
def http(server):
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        yield client


def complete(http: httpx2.Client, **body) -> dict:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def chat(http: httpx2.Client, **body) -> dict:
    response = http.post("/v1/chat/completions", json={"messages": HI, **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx2.Client, path: str, **body) -> list[dict]:
    response = http.post(path, json={"stream": True, **body})
    events = [event for event in response.text.split("\n\n") if event.startswith("data: {")]
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_greedy_samples_may_be_several(http):
    texts = [
        choice["text"]
        for choice in complete(http, prompt="ab", n=2, temperature=0, max_tokens=2)["choices"]
    ]
    assert texts == ["ab", "ab"]


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"truncate_prompt_tokens": 2}, "lo"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, "lo"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "he"),
        ({"truncate_prompt_tokens": -1}, "hello"),
    ],
)
def test_a_prompt_is_cut_to_the_tokens_asked_for(http, body, prompt):
    for given in ("hello", [*b"hello"]):
        reply = complete(http, prompt=given, max_tokens=1, echo=True, **body)
        assert reply["choices"][0]["text"] == prompt + prompt[0]
        assert reply["usage"]["prompt_tokens"] == len(prompt)


def test_a_prompt_too_long_is_cut_to_what_the_answer_leaves(http):
    reply = complete(http, prompt="x" * 9000, max_tokens=28, truncate_prompt_tokens=-1)
    assert reply["usage"]["prompt_tokens"] == 100
    long = [{"role": "user", "content": "x" * 9000}]
    reply = chat(http, messages=long, max_tokens=28, truncate_prompt_tokens=-1)
    assert reply["usage"]["prompt_tokens"] == 100


def test_logprobs_of_listed_tokens_stand_in_place_of_the_likeliest(http):
    listed = {"logprobs": 0, "logprob_token_ids": [100, 99, 100]}
    (choice,) = complete(http, prompt="a", max_tokens=1, **listed)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"a": -1.0, "d": -4.0, "c": -3.0}]
    listed = {"logprobs": True, "logprob_token_ids": [118]}
    content = chat(http, max_tokens=1, **listed)["choices"][0]["logprobs"]["content"]
    assert [(top["token"], top["logprob"]) for top in content[0]["top_logprobs"]] == [("v", -2.0)]


def test_minus_one_logprob_is_the_whole_vocabulary():
    with EchoServer(max_logprobs=256) as server, httpx2.Client(base_url=server.url) as http:
        body = {"prompt": "ab", "max_tokens": 1, "return_tokens_as_token_ids": True}
        (choice,) = complete(http, logprobs=-1, prompt_logprobs=-1, **body)["choices"]
        assert len(choice["logprobs"]["top_logprobs"][0]) == 256
        assert len(choice["prompt_logprobs"][1]) == 256
        top = chat(http, max_tokens=1, logprobs=True, top_logprobs=-1)["choices"][0]["logprobs"]
        assert len(top["content"][0]["top_logprobs"]) == 256


def test_a_chunk_has_as_many_tokens_as_asked_for(http):
    body = {"prompt": "hello", "max_tokens": 12, "logprobs": 0, "return_token_ids": True}
    events = stream(http, "/v1/completions", stream_interval=5, **body)
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == "hellohellohe"
    assert all(len(choice["token_ids"]) >= 5 for choice in choices[1:-1])
    assert len(choices) <= 4
    assert [token for choice in choices for token in choice["logprobs"]["tokens"]] == [
        *"hellohellohe"
    ]


def test_the_server_has_a_stream_interval_of_its_own():
    config = ServerConfig(stream_interval=100)
    with EchoServer(config, step_s=0.001) as server, httpx2.Client(base_url=server.url) as http:
        body = {"prompt": "hello", "max_tokens": 50}
        assert len(stream(http, "/v1/completions", **body)) == 2
        assert len(stream(http, "/v1/completions", stream_interval=1, **body)) > 3


def test_usage_may_end_every_stream():
    config = ServerConfig(enable_force_include_usage=True)
    with EchoServer(config) as server, httpx2.Client(base_url=server.url) as http:
        for path, body in (
            ("/v1/completions", {"prompt": "hi", "max_tokens": 2}),
            ("/v1/chat/completions", {"messages": HI, "max_tokens": 2}),
        ):
            *chunks, last = stream(http, path, **body)
            assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)
            assert all(chunk["usage"] is None for chunk in chunks)


def test_repetition_ends_the_answer(http):
    watch = {"max_pattern_size": 3, "min_count": 3}
    body = {"prompt": "abc", "max_tokens": 60, "logprobs": 0, "repetition_detection": watch}
    reply = complete(http, **body)
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abcabcabc", "repetition")
    assert len(choice["logprobs"]["tokens"]) == reply["usage"]["completion_tokens"] == 9
    assert (
        'engine="0",finished_reason="repetition",model_name="echo"} 1.0'
        in http.get("/metrics").text
    )
    watch["max_pattern_size"] = 2
    assert complete(http, **body)["choices"][0]["finish_reason"] == "length"


def test_the_last_message_is_echoed_if_the_answer_goes_on_with_it(http):
    messages = [*HI, {"role": "assistant", "content": "yes"}]
    body = {"messages": messages, "echo": True, "max_tokens": 4}
    assert chat(http, **body)["choices"][0]["message"]["content"] == "yesu:hi"
    events = stream(http, "/v1/chat/completions", **body)
    texts = [event["choices"][0]["delta"]["content"] for event in events]
    assert texts[:2] == ["", "yes"] and "".join(texts) == "yesu:hi"
    body["messages"] = HI
    assert chat(http, **body)["choices"][0]["message"]["content"] == "u:hi"


def test_the_rendered_prompt_comes_when_asked_for(http):
    assert chat(http, max_tokens=1, return_prompt_text=True)["prompt_text"] == "u:hi;a:"
    assert chat(http, max_tokens=1)["prompt_text"] is None
    events = stream(
        http, "/v1/chat/completions", messages=HI, max_tokens=1, return_prompt_text=True
    )
    assert [event.get("prompt_text") for event in events] == ["u:hi;a:", None]


def test_the_priority_header_goes_before_the_body(http):
    for headers, status in (({"X-Vllm-Priority": "0"}, 200), ({"X-Vllm-Priority": "1"}, 400)):
        body = {"prompt": "a", "max_tokens": 1, "priority": 1 - int(headers["X-Vllm-Priority"])}
        assert http.post("/v1/completions", json=body, headers=headers).status_code == status
    response = http.post("/v1/completions", json=body, headers={"X-Vllm-Priority": "high"})
    assert response.json()["error"]["param"] == "x-vllm-priority"


def test_a_stop_string_is_shown_when_asked_for(http):
    body = {"prompt": "hello", "max_tokens": 20, "stop": "l", "include_stop_str_in_output": True}
    assert complete(http, **body)["choices"][0]["text"] == "hel"
    body = {"prompt": "hello", "stop_token_ids": [111], "include_stop_str_in_output": True}
    assert complete(http, **body)["choices"][0]["text"] == "hello"


def test_no_stop_string_ends_the_text_before_min_tokens(http):
    body = {"prompt": "hello", "max_tokens": 20, "stop": "l"}
    assert complete(http, min_tokens=6, **body)["choices"][0]["text"] == "hellohe"


def test_special_tokens_are_framed_as_asked(server, http):
    with_bos = dataclasses.replace(server.state.text, tokenizer=byte_tokenizer(add_bos_token=True))
    with EchoServer(vocab_size=260) as other, httpx2.Client(base_url=other.url) as http:
        other.state.text = with_bos
        for add, expected in ((None, [256, 97]), (True, [256, 97]), (False, [97])):
            body = {"prompt": "a", "max_tokens": 1, "return_token_ids": True}
            reply = complete(http, add_special_tokens=add, **body)
            assert reply["choices"][0]["prompt_token_ids"] == expected
        body = {"prompt": [97, 259], "max_tokens": 2}
        assert complete(http, **body)["choices"][0]["text"] == "a"
        reply = complete(http, skip_special_tokens=False, **body)
        assert reply["choices"][0]["text"] == "a<|end|>"


def test_a_suffix_makes_a_prompt_to_fill_in(server):
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    with EchoServer(vocab_size=263) as other, httpx2.Client(base_url=other.url) as http:
        other.state.text = dataclasses.replace(
            server.state.text, tokenizer=byte_tokenizer(marks=marks)
        )
        body = {"prompt": ["a", "b"], "suffix": "z", "max_tokens": 1, "return_token_ids": True}
        choices = complete(http, **body)["choices"]
        assert [choice["prompt_token_ids"] for choice in choices] == [
            [260, 97, 261, 122, 262],
            [260, 98, 261, 122, 262],
        ]


def test_a_requests_template_renders_it(http):
    body = {"chat_template": "{{ messages[0].content }}{{ x }}!", "max_tokens": 4}
    assert chat(http, chat_template_kwargs={"x": 7}, **body)["choices"][0]["message"][
        "content"
    ] == ("hi7!")
    documents = [{"title": "t"}]
    body["chat_template"] = "{{ documents[0].title }}"
    assert chat(http, documents=documents, **body)["choices"][0]["message"]["content"] == "tttt"


def test_a_slow_template_holds_nobody_up(http):
    body = {"messages": HI, "chat_template": "{{ 10 ** (10 ** 8) }}"}
    times_s = [time.monotonic()]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(http.post, "/v1/chat/completions", json=body)
        while not slow.done():
            assert http.get("/health").status_code == 200
            times_s.append(time.monotonic())
            time.sleep(0.01)
    assert slow.result().status_code == 400
    assert "exceeded 1 s of CPU time" in slow.result().json()["error"]["message"]
    longest_s = max(after - before for before, after in itertools.pairwise(times_s))
    assert longest_s < (times_s[-1] - times_s[0]) / 2


@pytest.mark.parametrize(
    ("template", "param", "message"),
    [
        ("{{ 'a' * 10 ** 10 }}", "messages", "MiB"),
        ("{% if %}", "chat_template", "does not parse"),
        ("(" * 70_000, "chat_template", "the limit is 65536"),
        ("{{ ''.__class__.__mro__ }}", "messages", "unsafe"),
        ("{{ raise_exception('no') }}", "messages", "no"),
    ],
)
def test_a_requests_template_is_held_to_limits(http, template, param, message):
    body = {"messages": HI, "chat_template": template}
    response = http.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_developer_is_system_where_the_template_does_not_know_it(http):
    messages = [{"role": "developer", "content": "x"}, *HI]
    reply = chat(http, messages=messages, max_tokens=1, return_prompt_text=True)
    assert reply["prompt_text"] == "s:x;u:hi;a:"


def test_unknown_fields_are_listed_in_the_debug_log(http, caplog):
    caplog.set_level(logging.DEBUG, "jaxserve.server.body")
    complete(http, prompt="a", max_tokens=1, zeta=1, store=False, user="me")
    assert "store, user, zeta" in caplog.text


def test_a_silent_stream_says_that_it_lives():
    config = ServerConfig(sse_keep_alive_interval=0.02)
    with EchoServer(config, step_s=0.1) as server, httpx2.Client(base_url=server.url) as http:
        body = {"prompt": "hello", "max_tokens": 3, "stream": True}
        text = http.post("/v1/completions", json=body).text
    assert ": keep-alive\n\n" in text
    events = [event for event in text.split("\n\n") if event.startswith("data: {")]
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events) == "hel"
