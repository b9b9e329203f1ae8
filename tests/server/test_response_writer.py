"""Events of a Responses stream, checked against the official client's types."""

import orjson
import pydantic
import pytest
from openai.types.responses import Response as ClientResponse, ResponseStreamEvent

from jaxserve.server.protocol.responses import (
    InputDetails,
    OutputDetails,
    Response,
    ResponseUsage,
)
from jaxserve.server.response_input import unpack_reasoning
from jaxserve.server.response_writer import ResponseWriter
from jaxserve.text.message import CallDelta, Said

USAGE = ResponseUsage(
    input_tokens=3,
    input_tokens_details=InputDetails(cached_tokens=1),
    output_tokens=4,
    output_tokens_details=OutputDetails(reasoning_tokens=2),
    total_tokens=7,
)
STEPS = [
    Said(reasoning="hm"),
    Said(reasoning="m", content="I "),
    Said(content="add", calls=(CallDelta(0, id="c0", name="add", arguments='{"a"'),)),
    Said(calls=(CallDelta(0, ":1}"), CallDelta(1, "{}", id="c1", name="mul"))),
]
_event = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def writer():
    response = Response(
        id="resp_1",
        created_at=1,
        status="in_progress",
        model="m",
        output=[],
        parallel_tool_calls=True,
        store=True,
        temperature=1.0,
        text={"format": {"type": "text"}},
        tool_choice="auto",
        tools=[],
        top_p=1.0,
        truncation="disabled",
    )
    return ResponseWriter(response, packs_reasoning=True)


def told(events) -> list[dict]:
    """Returns events as a client reads them; each must be one that the official client knows."""
    sent = [orjson.loads(orjson.dumps(event)) for event in events]
    for event in sent:
        assert _event.validate_python(event).to_dict(mode="json").items() <= event.items()
    return sent


def short(event: dict) -> str:
    kind = event["type"].removeprefix("response.")
    return f"{event['output_index']} {kind}" if "output_index" in event else kind


def test_reasoning_text_and_calls_follow_one_another(writer):
    events = told(writer.start() + [e for said in STEPS for e in writer.add(said)])
    events += told(writer.finish("stop", USAGE))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [short(event) for event in events] == [
        "created",
        "in_progress",
        "0 output_item.added",
        "0 content_part.added",
        "0 reasoning_text.delta",
        "0 reasoning_text.delta",
        "0 reasoning_text.done",
        "0 content_part.done",
        "0 output_item.done",
        "1 output_item.added",
        "1 content_part.added",
        "1 output_text.delta",
        "1 output_text.delta",
        "1 output_text.done",
        "1 content_part.done",
        "1 output_item.done",
        "2 output_item.added",
        "2 function_call_arguments.delta",
        "2 function_call_arguments.delta",
        "2 function_call_arguments.done",
        "2 output_item.done",
        "3 output_item.added",
        "3 function_call_arguments.delta",
        "3 function_call_arguments.done",
        "3 output_item.done",
        "completed",
    ]
    final = ClientResponse.model_validate(events[-1]["response"])
    reasoning, message, add, mul = final.output
    assert reasoning.content[0].text == "hmm"
    assert unpack_reasoning(reasoning.encrypted_content, "p") == "hmm"
    assert message.content[0].text == final.output_text == "I add"
    assert (add.call_id, add.name, add.arguments) == ("c0", "add", '{"a":1}')
    assert (mul.call_id, mul.name, mul.arguments) == ("c1", "mul", "{}")
    assert {item.status for item in final.output} == {"completed"}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]


def test_text_behind_the_end_of_a_call_in_one_piece_comes_behind_it(writer):
    call = CallDelta(0, id="c0", name="add", arguments='{"a"')
    writer.add(Said(calls=(call,)))
    writer.add(Said(content="Done", calls=(CallDelta(0, ":1}"),)))
    writer.finish("stop", USAGE)
    first, second = writer.response.output
    assert (first.arguments, second.content[0].text) == ('{"a":1}', "Done")


def test_a_response_cut_off_is_incomplete_where_it_was_cut(writer):
    for said in STEPS[:3]:
        writer.add(said)
    last = told(writer.finish("length", USAGE))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    statuses = [item["status"] for item in last["response"]["output"]]
    assert statuses == ["completed", "completed", "incomplete"]


def test_an_answer_of_nothing_is_an_empty_message(writer):
    (last,) = told(writer.finish("stop", USAGE))[-1:]
    assert last["response"]["output"][0]["content"][0]["text"] == ""


def test_a_failure_keeps_what_was_finished(writer):
    for said in STEPS[:2]:
        writer.add(said)
    (failed,) = told(writer.fail("gone"))
    assert failed["response"]["error"] == {"code": "server_error", "message": "gone"}
    assert [item["type"] for item in failed["response"]["output"]] == ["reasoning"]
