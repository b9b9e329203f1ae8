"""Talks to a running server as Anthropic's client does: /v1/messages, streamed and not.

scripts/clients/anthropic_messages.py [--url http://127.0.0.1:8000] [--tools] [--key KEY]

Takes `pip install anthropic`. `--tools` also makes the model use a tool, which takes a model that
was taught to. Prints the conversation; an answer that is not of the protocol's form raises.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import anthropic

WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "the city's name"}},
        "required": ["city"],
    },
}
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
    },
    "required": ["name", "country"],
    "additionalProperties": False,
}
ROME = "Describe Rome as JSON with its name and its country."
GREEDY = {"temperature": 0}  # newer clients have no argument for it
WANTED = "Call get_weather whenever you are asked for the weather."
QUESTION = "What is the weather in Paris?"
RESULT = json.dumps({"temperature_celsius": 31, "sky": "sunny"})


def main() -> None:
    """Runs every conversation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    parser.add_argument("--tools", action="store_true")
    options = parser.parse_args()
    client = anthropic.Anthropic(
        base_url=options.url, api_key=options.key, timeout=600, max_retries=0
    )
    with client:
        converse(client)
        stream(client)
        keep_to_a_schema(client)
        refuse(client)
        if options.tools:
            use_a_tool(client, is_streamed=False)
            use_a_tool(client, is_streamed=True)


def text_of(message: anthropic.types.Message) -> str:
    """Returns what the model said."""
    return "".join(block.text for block in message.content if block.type == "text")


def converse(client: anthropic.Anthropic) -> None:
    """Asks, and compares the counted tokens with those of the answer's usage."""
    asked: dict[str, Any] = {
        "model": "",
        "system": [{"type": "text", "text": "Answer in a few words."}],
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    counted = client.messages.count_tokens(**asked).input_tokens
    message = client.messages.create(**asked, max_tokens=48, extra_body=GREEDY)
    print(f"> {text_of(message)!r} ({message.stop_reason}, {counted} tokens asked)")
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    asked["messages"] += [
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": "And of Spain?"},
    ]
    message = client.messages.create(**asked, max_tokens=48, extra_body=GREEDY)
    print(f"> {text_of(message)!r} ({message.stop_reason})")


def stream(client: anthropic.Anthropic) -> None:
    """Streams, and compares with the same request unstreamed."""
    asked: dict[str, Any] = {
        "model": "",
        "messages": [{"role": "user", "content": "Count from one to ten in words."}],
        "max_tokens": 64,
        "extra_body": GREEDY,
        "stop_sequences": ["ten", "Ten", "10"],
    }
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as events:
        said = "".join(events.text_stream)
        message = events.get_final_message()
    print(f"> {said!r} ({message.stop_reason}, {message.stop_sequence!r})")
    assert said == text_of(message) == text_of(whole)
    assert (message.stop_reason, message.stop_sequence) == (whole.stop_reason, whole.stop_sequence)


def keep_to_a_schema(client: anthropic.Anthropic) -> None:
    """Asks for JSON of one form."""
    message = client.messages.create(
        model="",
        max_tokens=64,
        messages=[{"role": "user", "content": ROME}],
        output_config={"format": {"type": "json_schema", "schema": CITY}},
        extra_body=GREEDY,
    )
    print(f"> {text_of(message)!r} ({message.stop_reason})")
    assert set(json.loads(text_of(message))) == {"name", "country"}


def refuse(client: anthropic.Anthropic) -> None:
    """Asks for what cannot be had."""
    image = {"type": "image", "source": {"type": "url", "url": "http://localhost/a.png"}}
    try:
        client.messages.create(
            model="", max_tokens=1, messages=[{"role": "user", "content": [image]}]
        )
    except anthropic.BadRequestError as error:
        print(f"> refused: {error.body}")
    else:
        raise AssertionError("an image was taken")


def use_a_tool(client: anthropic.Anthropic, *, is_streamed: bool) -> None:
    """Lets the model use a tool, and gives it the result."""
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: dict[str, Any] = {
        "model": "",
        "system": WANTED,
        "tools": [WEATHER],
        "max_tokens": 96,
        "extra_body": GREEDY,
    }
    if is_streamed:
        with client.messages.stream(messages=messages, **asked) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(messages=messages, **asked)
    uses = [block for block in message.content if block.type == "tool_use"]
    assert uses and message.stop_reason == "tool_use", message
    results = []
    for use in uses:
        print(f"> {use.name}({use.input})")
        assert "Paris" in use.input["city"]
        results.append({"type": "tool_result", "tool_use_id": use.id, "content": RESULT})
    messages += [
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": results},
    ]
    answer = client.messages.create(messages=messages, tool_choice={"type": "none"}, **asked)
    print(f"> {text_of(answer)!r} ({answer.stop_reason})")
    assert "31" in text_of(answer) or "sunny" in text_of(answer)
    forced = client.messages.create(
        messages=[{"role": "user", "content": "Tell me a joke."}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        **asked,
    )
    (use,) = [block for block in forced.content if block.type == "tool_use"]
    print(f"> {use.name}({use.input}), as it had to")
    assert set(use.input) == {"city"}


if __name__ == "__main__":
    main()
