"""Tools and reasoning in /v1/chat/completions, over a real socket: an echo plays the model.

The echo answers with its prompt: what a test puts into the conversation is what "the model" says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json

import httpx2
import openai
import pytest

from jaxserve.text import reasoning, tool_parsers
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.message_format import MessageFormat
from tests.server.serving import EchoServer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome"]}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
# Neither its beginning nor its name nor its city is what a grammar would let pass.
WRONG = '!tool_call>\n{"name": "whether", "arguments": {"city": "Oslo"}}\n</tool_call>'
# Renders nothing but the last message, and "tools" so that it is one that knows them.
TEMPLATE = (
    "{% if tools and show %}{{ tools[0].function.name }}{% endif %}{{ messages[-1].content }}"
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    "{% if reasoning_effort is defined %}({{ reasoning_effort }}){% endif %}"
)


@pytest.fixture(scope="module")
def server():
    with (
        EchoServer(max_model_len=1024) as server,
        formats(server, tool_parsers.HERMES, reasoning.QWEN_3),
    ):
        yield server


@contextlib.contextmanager
def formats(server, tools, thoughts):
    """Lets the model's formats be others for a while."""
    known = server.state.text
    server.state.text = dataclasses.replace(
        known,
        chat_template=ChatTemplate(TEMPLATE),
        format=MessageFormat(tools=tools, reasoning=thoughts),
    )
    try:
        yield
    finally:
        server.state.text = known


@pytest.fixture(scope="module")
def http(server):
    with httpx2.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


def says(text, **body):
    """Returns the body of a request whose answer is `text`, which ends with ~."""
    return {
        "messages": [{"role": "user", "content": text + "~"}],
        "stop": "~",
        "tools": [WEATHER],
        "temperature": 0,
        **body,
    }


def chat(http, text, **body):
    response = http.post("/v1/chat/completions", json=says(text, **body))
    assert response.status_code == 200, response.text
    return response.json()


def events(http, text, **body):
    response = http.post("/v1/chat/completions", json=says(text, stream=True, **body))
    *events, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_call_has_the_openai_form(http):
    (choice,) = chat(http, f"I look.{CALL}")["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "I look."
    (call,) = message["tool_calls"]
    assert call.pop("id").startswith("chatcmpl-tool-")
    assert call == {
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    assert chat(http, CALL)["choices"][0]["message"]["content"] is None


def test_an_answer_without_calls_has_no_such_key(http):
    (choice,) = chat(http, "Hello")["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "Hello"
    assert "tool_calls" not in choice["message"]


def test_a_stream_gives_id_type_and_name_once_and_then_arguments(http):
    *chunks, last = events(http, f"Hi{CALL}{CALL}")
    deltas = [chunk["choices"][0]["delta"] for chunk in (*chunks, last)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hi"
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    for index in (0, 1):
        first, *rest = (call for call in calls if call["index"] == index)
        assert set(first) == {"index", "id", "type", "function"}
        assert (first["type"], first["function"]["name"]) == ("function", "weather")
        assert all(set(call) == {"index", "function"} for call in rest)
        arguments = [call["function"]["arguments"] for call in (first, *rest)]
        assert "".join(arguments) == '{"city": "Rome"}'
    assert last["choices"][0]["finish_reason"] == "tool_calls"


def test_only_the_first_call_is_kept_without_parallel_calls(http):
    (choice,) = chat(http, CALL * 2, parallel_tool_calls=False)["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


def test_a_call_that_is_cut_short_is_told_by_the_finish_reason(http):
    (choice,) = chat(http, CALL, max_tokens=50)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city'


def test_without_tools_or_with_the_choice_none_calls_are_text(http):
    assert chat(http, CALL, tools=None)["choices"][0]["message"]["content"] == CALL
    (choice,) = chat(http, CALL, tool_choice="none")["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


def test_tools_reach_the_template(http):
    reply = chat(http, "Hello", chat_template_kwargs={"show": True})
    assert reply["choices"][0]["message"]["content"] == "weatherHello"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_can_be_forced(http, choice):
    body = {"tool_choice": choice, "max_tokens": 100}
    (told,) = chat(http, WRONG, **body)["choices"]
    call = told["message"]["tool_calls"][0]
    assert told["message"]["content"] is None
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    if choice != "required":
        assert told["finish_reason"] == "stop"
        deltas = [event["choices"][0]["delta"] for event in events(http, WRONG, **body)]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Rome"}'


def test_strict_tools_hold_calls_to_their_schema(http):
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    text = CALL.replace(">{", ">\n{").replace("}<", "}\n<").replace("Rome", "Oslo")
    free = chat(http, text)["choices"][0]["message"]["tool_calls"][0]
    assert json.loads(free["function"]["arguments"]) == {"city": "Oslo"}
    held = chat(http, text, tools=[strict], max_tokens=90)["choices"][0]["message"]["tool_calls"][0]
    assert json.loads(held["function"]["arguments"]) == {"city": "Rome"}
    assert chat(http, "Hello", tools=[strict])["choices"][0]["message"]["content"] == "Hello"


def test_reasoning_is_told_under_both_names_and_counted(http):
    reply = chat(http, "<think>\nHm</think>\n\nHi", tools=None)
    message = reply["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Hm"
    assert message["content"] == "Hi"
    assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    chunks = events(http, "<think>\nHm</think>\n\nHi", stream_options={"include_usage": True})
    usage = chunks.pop()["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    for key, text in (("reasoning", "Hm"), ("reasoning_content", "Hm"), ("content", "Hi")):
        assert "".join(delta.get(key) or "" for delta in deltas) == text


def test_reasoning_can_be_left_out(http):
    message = chat(http, "<think>Hm</think>Hi", include_reasoning=False)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (None, "Hi")


@pytest.mark.parametrize("tools", [None, [WEATHER]])
@pytest.mark.parametrize(
    ("budget", "thought", "content"),
    [(0, None, "cdefgh"), (4, "abcd", "fgh")],  # less the letters in whose place marks came
)
def test_thinking_ends_when_its_budget_is_spent(server, http, tools, budget, thought, content):
    # The echo's tokenizer has these as single tokens.
    marks = reasoning.ReasoningFormat(
        name="test", starts=("<|user|>",), ends=("<|end|>",), is_open_at_start=True
    )
    asked = {"tools": tools, "thinking_token_budget": budget, "stop": None, "max_tokens": 8}
    with formats(server, tool_parsers.HERMES, marks):
        reply = chat(http, "abcdefgh", **asked)
    message = reply["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (thought, content)
    assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": budget}


def test_the_form_of_an_answer_begins_after_the_thinking(server, http):
    marks = reasoning.ReasoningFormat(
        name="test", starts=("^",), ends=("!",), is_open_at_start=True
    )
    form = {"response_format": {"type": "json_object"}, "stop": None}
    with formats(server, None, marks):
        message = chat(http, "hm, {!{}", tools=None, **form)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm, {", "{}")


def test_logprobs_and_token_ids_keep_all_tokens(http):
    text = f"<think>Hm</think>{CALL}"
    options = {"logprobs": True, "return_token_ids": True}
    (choice,) = chat(http, text, **options)["choices"]
    chunks = [event["choices"][0] for event in events(http, text, **options)]
    streamed = [token for chunk in chunks for token in chunk.get("token_ids") or ()]
    logprobs = [
        entry for chunk in chunks for entry in (chunk["logprobs"] or {"content": ()})["content"]
    ]
    assert bytes(choice["token_ids"]).decode() == f"{text}~"
    assert streamed == choice["token_ids"]
    assert logprobs == choice["logprobs"]["content"]
    assert len(logprobs) == len(streamed)


def test_an_effort_becomes_variables_of_the_template(http):
    for effort, shown in (("none", "[False](none)"), ("high", "[True](high)")):
        reply = chat(http, "Hi", reasoning_effort=effort, stop=")", include_stop_str_in_output=True)
        assert reply["choices"][0]["message"]["content"] == f"Hi~{shown}"
    given = {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}
    reply = chat(http, "Hi", stop="]", **given)
    assert reply["choices"][0]["message"]["content"] == "Hi~[True"


def tool(**function):
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"tools": []}, "tools", "0 entries"),
        ({"tools": [tool()] * 129}, "tools", "129 entries"),
        ({"tools": [tool(), tool()]}, "tools", "'f' again"),
        ({"tools": [tool(name="a b")]}, "tools", "'a b'"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools", "parameters"),
        ({"tools": [tool(parameters=[1])]}, "tools", "parameters"),
        ({"tools": [tool(description=1)]}, "tools", "description"),
        ({"tools": [tool(strict="yes")]}, "tools", "strict"),
        ({"tools": [{"type": "retrieval"}]}, "tools", "retrieval"),
        ({"tools": [tool(description="x" * 300_000)]}, "tools", "limit"),
        ({"tools": [tool(parameters={"minimum": 10**30})]}, "tools", ""),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "any"}, "tool_choice", "any"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "no such function",
        ),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "response_format",
        ),
        ({"functions": [{"name": "f"}]}, "functions", ""),
        ({"thinking_token_budget": 5}, "thinking_token_budget", "qwen3"),
        ({"thinking_token_budget": -1}, "thinking_token_budget", "-1"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", ""),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(http, body, param, part):
    response = http.post("/v1/chat/completions", json=says("Hi", **body))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert part in error["message"]


@pytest.mark.parametrize(
    ("format", "options", "part"),
    [
        (None, {}, "--tool-call-parser"),
        (tool_parsers.PYTHONIC, {"tool_choice": "required"}, "pythonic"),
    ],
)
def test_a_model_without_a_form_for_calls_is_refused(server, http, format, options, part):
    with formats(server, format, None):
        response = http.post("/v1/chat/completions", json=says("Hi", **options))
    assert response.status_code == 400
    assert part in response.json()["error"]["message"]


def test_the_models_list_tells_the_parsers(http):
    (card, _) = http.get("/v1/models").json()["data"]
    assert (card["tool_call_parser"], card["reasoning_parser"]) == ("hermes", "qwen3")


def test_the_openai_client_collects_a_streamed_call(client):
    body = says(f"Hi{CALL}")
    with client.chat.completions.stream(model="echo", **body) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "Hi"
    assert final.message.tool_calls[0].function.arguments == '{"city": "Rome"}'
