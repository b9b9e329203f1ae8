"""/v1/completions over a real socket: replies, streams, and the tokens that stand behind them."""

import json

import httpx2
import pytest

from tests.server.serving import EchoServer


@pytest.fixture(scope="module")
def http():
    with EchoServer() as server, httpx2.Client(base_url=server.url) as client:
        yield client


def complete(http: httpx2.Client, **body) -> dict:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx2.Client, **body) -> list[dict]:
    """Returns the events of a stream; asserts its form."""
    response = http.post("/v1/completions", json={"stream": True, **body})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, nothing = response.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_completion_has_the_openai_form(http):
    reply = complete(http, model="alias", prompt="hello", max_tokens=7)
    assert reply["id"].startswith("cmpl-")
    assert (reply["object"], reply["model"]) == ("text_completion", "echo")
    (choice,) = reply["choices"]
    assert choice["text"] == "hellohe"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert reply["usage"]["prompt_tokens"] == 5
    assert reply["usage"]["completion_tokens"] == 7
    assert reply["usage"]["total_tokens"] == 12


def test_sixteen_tokens_are_the_default(http):
    assert complete(http, prompt="ab")["usage"]["completion_tokens"] == 16


def test_max_tokens_is_cut_to_the_context(http):
    reply = complete(http, prompt="x" * 100, max_tokens=128)
    assert reply["usage"]["completion_tokens"] == 28
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [104, 105], [[104, 105]]])
def test_a_prompt_may_be_text_or_tokens_one_or_many(http, prompt):
    assert complete(http, prompt=prompt, max_tokens=4)["choices"][0]["text"] == "hihi"


def test_choices_are_numbered_by_prompt_then_sample(http):
    reply = complete(http, prompt=["ab", "cde"], n=2, max_tokens=3)
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [
        (0, "aba"),
        (1, "aba"),
        (2, "cde"),
        (3, "cde"),
    ]
    assert reply["usage"]["prompt_tokens"] == 5
    assert reply["usage"]["completion_tokens"] == 12


def test_a_stop_string_ends_the_text_before_it(http):
    (choice,) = complete(http, prompt="hello", max_tokens=20, stop=["lo", "zz"])["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hel", "stop", "lo")


def test_a_stop_token_ends_the_text_before_it(http):
    (choice,) = complete(http, prompt="hello", stop_token_ids=[111])["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hell", "stop", 111)


def test_echo_puts_the_prompt_in_front(http):
    assert complete(http, prompt="hi", max_tokens=2, echo=True)["choices"][0]["text"] == "hihi"


def test_echo_without_new_tokens_scores_the_prompt(http):
    reply = complete(http, prompt="abc", max_tokens=0, echo=True, logprobs=1)
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert reply["usage"]["completion_tokens"] == 0
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "text_offset": [0, 1, 2],
        "token_logprobs": [None, -1.0, -1.0],
        "top_logprobs": [None, {"b": -1.0}, {"c": -1.0}],
    }


def test_echo_without_new_tokens_hides_the_one_the_engine_makes(http):
    body = {"prompt": "abc", "max_tokens": 0, "echo": True, "return_token_ids": True, "stop": "a"}
    assert complete(http, **body)["choices"][0]["token_ids"] == []
    (event,) = stream(http, **body)
    (choice,) = event["choices"]
    assert (choice["text"], choice["token_ids"]) == ("abc", [])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)


def test_logprobs_hold_the_chosen_token_then_the_likeliest(http):
    (choice,) = complete(http, prompt="ab", max_tokens=2, logprobs=2, echo=True)["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "a", "b"]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["top_logprobs"][2] == {"a": -1.0, "b": -2.0}


def test_every_sample_echoes_the_prompts_logprobs(http):
    body = {"prompt": "ab", "n": 2, "max_tokens": 1, "logprobs": 0, "echo": True}
    for choice in complete(http, **body)["choices"]:
        assert choice["logprobs"]["tokens"] == ["a", "b", "a"]
    tokens = {0: [], 1: []}
    for event in stream(http, **body):
        tokens[event["choices"][0]["index"]] += event["choices"][0]["logprobs"]["tokens"]
    assert tokens == {0: ["a", "b", "a"], 1: ["a", "b", "a"]}


def test_prompt_logprobs_are_keyed_by_token(http):
    (choice,) = complete(http, prompt="ab", max_tokens=1, prompt_logprobs=1)["choices"]
    expected = {"98": {"logprob": -1.0, "rank": 1, "decoded_token": "b"}}
    assert choice["prompt_logprobs"] == [None, expected]


def test_token_ids_come_when_asked_for(http):
    (choice,) = complete(
        http, prompt="ab", max_tokens=1, return_token_ids=True, logprobs=0,
        return_tokens_as_token_ids=True,
    )["choices"]  # fmt: skip
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([97], [97, 98])
    assert choice["logprobs"]["tokens"] == ["token_id:97"]


def test_the_request_id_of_the_header_goes_first(http):
    headers = {"X-Request-Id": "mine"}
    body = {"prompt": "a", "request_id": "other"}
    assert http.post("/v1/completions", json=body, headers=headers).json()["id"] == "cmpl-mine"
    assert http.post("/v1/completions", json=body).json()["id"] == "cmpl-other"


def test_unknown_fields_are_accepted(http):
    assert complete(http, prompt="a", metadata={"x": 1}, user="me", store=False)


def test_a_stream_holds_the_same_text_as_the_reply(http):
    events = stream(http, prompt="héllo ✓", max_tokens=20)
    text = "".join(event["choices"][0]["text"] for event in events)
    reply = complete(http, prompt="héllo ✓", max_tokens=20)
    assert text == reply["choices"][0]["text"] == "héllo ✓héllo ✓"[: len(text)]
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "length"
    assert all("usage" not in event for event in events)


def test_a_streams_usage_comes_in_a_last_chunk_without_choices(http):
    *chunks, last = stream(
        http, prompt=["ab", "c"], n=2, max_tokens=3, stream_options={"include_usage": True}
    )
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 3
    assert last["usage"]["completion_tokens"] == 12
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1, 2, 3}
    assert all(chunk["usage"] is None for chunk in chunks)


def test_continuous_usage_stands_on_every_chunk(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = stream(http, prompt="ab", max_tokens=4, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 4


def test_a_stop_string_is_never_streamed(http):
    events = stream(http, prompt="hello", max_tokens=50, stop="oh")
    assert "".join(event["choices"][0]["text"] for event in events) == "hell"
    assert events[-1]["choices"][0]["stop_reason"] == "oh"


def test_streamed_logprobs_are_those_of_the_reply(http):
    body = {"prompt": "hello", "max_tokens": 9, "logprobs": 2, "echo": True}
    joined = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for event in stream(http, **body):
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            joined[name] += values
    assert joined == complete(http, **body)["choices"][0]["logprobs"]
