"""Talks to a server with the official client: one tool, called, streamed, answered, and forced.

python scripts/clients/openai_tools.py http://127.0.0.1:8000/v1 MODEL
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import openai

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "the city's name"}},
            "required": ["city"],
        },
    },
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SYSTEM = {"role": "system", "content": "Call get_weather whenever you are asked for the weather."}
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
TOOL_RESULT = {"temperature_celsius": 31, "sky": "sunny"}


def ask(client: openai.OpenAI, model: str, messages: list[Any], **options: Any) -> Any:
    """Returns the only choice of an answer."""
    reply = client.chat.completions.create(
        model=model, messages=messages, tools=[WEATHER], temperature=0, max_tokens=96, **options
    )
    return reply.choices[0]


def ask_streaming(client: openai.OpenAI, model: str, messages: list[Any]) -> dict[str, Any]:
    """Returns the message that the stream's deltas add up to, and its finish reason."""
    content, reason = "", None
    calls: dict[int, dict[str, str]] = {}
    for chunk in ask_chunks(client, model, messages):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or ():
            if delta.id is not None:
                assert delta.type == "function" and delta.index not in calls
                calls[delta.index] = {"id": delta.id, "name": delta.function.name, "arguments": ""}
            calls[delta.index]["arguments"] += delta.function.arguments or ""
    return {"content": content, "calls": list(calls.values()), "finish_reason": reason}


def ask_chunks(client: openai.OpenAI, model: str, messages: list[Any]) -> Any:
    """Returns the stream of an answer's chunks."""
    return client.chat.completions.create(
        model=model,
        messages=messages,
        tools=[WEATHER],
        temperature=0,
        max_tokens=96,
        stream=True,
    )


def check(client: openai.OpenAI, model: str) -> None:
    """Holds the conversation; raises `AssertionError` where the server is wrong."""
    talk: list[Any] = [SYSTEM, QUESTION]
    choice = ask(client, model, talk)
    print(choice.message.to_json(indent=None))
    assert choice.finish_reason == "tool_calls", choice.finish_reason
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.function.name == "get_weather"
    assert "Paris" in json.loads(call.function.arguments)["city"]

    streamed = ask_streaming(client, model, talk)
    assert streamed["finish_reason"] == "tool_calls"
    assert streamed["content"] == (choice.message.content or "")
    assert [(each["name"], each["arguments"]) for each in streamed["calls"]] == [
        (each.function.name, each.function.arguments) for each in choice.message.tool_calls
    ]

    talk.append(choice.message)
    for each in choice.message.tool_calls:
        result = {"role": "tool", "tool_call_id": each.id, "content": json.dumps(TOOL_RESULT)}
        talk.append(result)
    answer = ask(client, model, talk, tool_choice="none")
    print(answer.message.content)
    assert answer.finish_reason in ("stop", "length") and not answer.message.tool_calls
    assert "31" in answer.message.content or "sunny" in answer.message.content

    joke: list[Any] = [{"role": "user", "content": "Tell me a joke."}]
    for forced, reason in (("required", "tool_calls"), (NAMED, "stop")):
        choice = ask(client, model, joke, tool_choice=forced, parallel_tool_calls=False)
        print(choice.message.to_json(indent=None))
        assert choice.finish_reason == reason, choice.finish_reason
        (call,) = choice.message.tool_calls
        assert set(json.loads(call.function.arguments)) == {"city"}


def main() -> None:
    """Reads the address and the model's name, and checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_url", help="ends in /v1")
    parser.add_argument("model")
    args = parser.parse_args()
    with openai.OpenAI(base_url=args.base_url, api_key="none", timeout=300) as client:
        check(client, args.model)
    print("ok")


if __name__ == "__main__":
    main()
