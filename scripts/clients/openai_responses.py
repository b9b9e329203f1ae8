"""Talks to a running server as OpenAI's client does: /v1/responses, streamed and not, with a tool.

scripts/clients/openai_responses.py [--url http://127.0.0.1:8000] [--tools] [--key KEY]

`--tools` also makes the model call a function, which takes a model that was taught to. Prints the
conversation; an answer that is not of the protocol's form raises.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import openai

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "the city's name"}},
        "required": ["city"],
    },
    "strict": False,
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
    with openai.OpenAI(base_url=f"{options.url}/v1", api_key=options.key, timeout=600) as client:
        model = next(iter(client.models.list())).id
        converse(client, model)
        stream(client, model)
        keep_to_a_schema(client, model)
        if options.tools:
            call_a_tool(client, model, is_streamed=False)
            call_a_tool(client, model, is_streamed=True)


def converse(client: openai.OpenAI, model: str) -> None:
    """Asks twice, the second time after what was stored of the first."""
    first = client.responses.create(
        model=model,
        instructions="Answer in a few words.",
        input="What is the capital of France?",
        max_output_tokens=48,
        temperature=0,
        metadata={"topic": "geography"},
    )
    print(f"> {first.output_text!r} ({first.status}, {first.usage.total_tokens} tokens)")
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(
        model=model,
        input="And of Spain?",
        previous_response_id=first.id,
        max_output_tokens=48,
        temperature=0,
    )
    print(f"> {second.output_text!r} ({second.status})")
    assert second.usage.input_tokens > first.usage.output_tokens
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError as error:
        print(f"> deleted: {error.message}")
    else:
        raise AssertionError("a deleted response is still there")


def stream(client: openai.OpenAI, model: str) -> None:
    """Streams, and compares with the same request unstreamed."""
    asked: dict[str, Any] = {
        "model": model,
        "input": [{"role": "user", "content": "Count from one to ten in words."}],
        "max_output_tokens": 64,
        "temperature": 0,
    }
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"], kinds
    assert kinds[-1] == f"response.{whole.status}", kinds
    assert [event.sequence_number for event in events] == list(range(len(events)))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    print(f"> {said!r} ({len(events)} events)")
    assert said == whole.output_text == events[-1].response.output_text


def keep_to_a_schema(client: openai.OpenAI, model: str) -> None:
    """Asks for JSON of one form."""
    format: Any = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    response = client.responses.create(
        model=model, input=ROME, text={"format": format}, max_output_tokens=64, temperature=0
    )
    print(f"> {response.output_text!r} ({response.status})")
    assert set(json.loads(response.output_text)) == {"name", "country"}


def call_a_tool(client: openai.OpenAI, model: str, *, is_streamed: bool) -> None:
    """Lets the model call a function, and gives it the result."""
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: dict[str, Any] = {
        "model": model,
        "instructions": WANTED,
        "tools": [WEATHER],
        "temperature": 0,
        "max_output_tokens": 96,
    }
    if is_streamed:
        events = list(client.responses.create(input=items, **asked, stream=True))
        response = events[-1].response
        kind = "response.function_call_arguments.delta"
        said = "".join(event.delta for event in events if event.type == kind)
        assert said == "".join(i.arguments for i in response.output if i.type == "function_call")
    else:
        response = client.responses.create(input=items, **asked)
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls, f"the model called nothing: {response.output_text!r}"
    items += response.output
    for call in calls:
        print(f"> {call.name}({call.arguments})")
        assert "Paris" in json.loads(call.arguments)["city"]
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": RESULT})
    answer = client.responses.create(input=items, tool_choice="none", **asked)
    print(f"> {answer.output_text!r} ({answer.status})")
    assert "31" in answer.output_text or "sunny" in answer.output_text
    forced = client.responses.create(
        input="Tell me a joke.", tool_choice="required", parallel_tool_calls=False, **asked
    )
    (call,) = [item for item in forced.output if item.type == "function_call"]
    print(f"> {call.name}({call.arguments}), as it had to")
    assert set(json.loads(call.arguments)) == {"city"}


if __name__ == "__main__":
    main()
