"""`response_format` and `structured_outputs` over a real socket: every spelling, every refusal."""

import json
import re

import httpx2
import jsonschema
import pytest

from tests.server.serving import EchoServer

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["a"],
}
CLOSED = {**SCHEMA, "additionalProperties": False}
TAG = {
    "structures": [{"begin": "<f=x>", "schema": {"type": "boolean"}, "end": "</f>"}],
    "triggers": ["<f"],
}
NESTED = {"type": "string"}
for _ in range(70):
    NESTED = {"type": "array", "items": NESTED}


@pytest.fixture(scope="module")
def http():
    with EchoServer(max_model_len=400) as server, httpx2.Client(base_url=server.url) as client:
        yield client


def complete(http, prompt, **body):
    """Returns the only choice of a completion."""
    response = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 60, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def answer(http, prompt, **outputs):
    return complete(http, prompt, structured_outputs=outputs)["text"]


def test_a_schema_shapes_the_answer_which_ends_by_itself(http):
    choice = complete(http, '{"a":7}', structured_outputs={"json": SCHEMA})
    assert (choice["text"], choice["finish_reason"]) == ('{"a":7}', "stop")


@pytest.mark.parametrize("schema", [CLOSED, json.dumps(CLOSED)])
def test_a_schema_may_be_an_object_or_a_text(http, schema):
    text = answer(http, "{}1234567", json=schema)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_a_regex_a_choice_and_a_grammar_shape_the_answer(http):
    assert re.fullmatch("[0-9]{3}-[a-c]{2}", answer(http, "1b2c3", regex="[0-9]{3}-[a-c]{2}"))
    assert answer(http, "nnnooo", choice=["yes", "no"]) == "no"
    assert answer(http, "aab", grammar='start: "a" start | "b"') == "aab"
    assert answer(http, "xx77", grammar='root ::= "x" n\nn ::= [0-9]') in ("x0", "x7")


def test_a_json_object_and_tags_shape_the_answer(http):
    assert isinstance(json.loads(answer(http, '{"b": [1]}', json_object=True)), dict)
    choice = complete(http, "say <f=x>true</f>", structured_outputs={"structural_tag": TAG})
    assert choice["text"].startswith("say <f=x>true</f>say ")
    # What the trigger has begun must go on as the tag says.
    assert "<f=x>false</f>" in answer(http, "<f=xyz", structural_tag=TAG)


@pytest.mark.parametrize(
    ("response_format", "prompt", "expected"),
    [
        ({"type": "json_object"}, '{"k":true}', '{"k":true}'),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": CLOSED}},
            '{"a":7}',
            '{"a":7}',
        ),
        ({"type": "structural_tag", **TAG}, "<f=x>true</f>", "<f=x>true</f>" * 4 + "<f=x>tru"),
        ({"type": "text"}, "ab", "ab" * 30),
    ],
)
def test_every_response_format_works_in_both_endpoints(http, response_format, prompt, expected):
    choice = complete(http, prompt, response_format=response_format)
    assert choice["text"] == expected
    messages = [{"role": "user", "content": prompt}]
    body = {"messages": messages, "max_tokens": 150, "response_format": response_format}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    content = response.json()["choices"][0]["message"]["content"]
    if response_format["type"] == "json_schema":
        jsonschema.validate(json.loads(content), CLOSED)
    elif response_format["type"] == "json_object":
        assert content.startswith("{")  # and not with the template's "u:"
    elif response_format["type"] == "structural_tag":
        assert re.search("<f=x>(true|false)</f>", content)


def test_strict_or_not_the_schema_holds(http):
    for strict in (True, False, None):
        body = {"type": "json_schema", "json_schema": {"strict": strict, "schema": CLOSED}}
        text = complete(http, '{"a": "no"}', response_format=body)["text"]
        jsonschema.validate(json.loads(text), SCHEMA)


def test_whitespace_options_and_closed_objects_shape_the_answer(http):
    spaced = '{ "a": 7 }'
    assert answer(http, spaced, json=SCHEMA) == spaced
    assert " " not in answer(http, spaced, json=CLOSED, disable_any_whitespace=True)
    tabs = answer(http, '{\t"a":\t7}', json=SCHEMA, whitespace_pattern=r"\t")
    assert tabs == '{\t"a":\t7}'
    assert " " not in answer(http, spaced, json=CLOSED, whitespace_pattern=r"\t")
    more = '{"a":7,"b":1}'
    assert answer(http, more, json=SCHEMA) == more
    assert answer(http, more, json=SCHEMA, disable_additional_properties=True) == '{"a":7}'


def test_a_stream_carries_the_last_token_of_a_complete_answer(http):
    body = {"prompt": "no", "stream": True, "structured_outputs": {"choice": ["no", "yes"]}}
    events = http.post("/v1/completions", json=body).text.split("\n\n")[:-2]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == "no"
    assert choices[-1]["finish_reason"] == "stop"


def test_all_samples_and_prompts_of_a_request_are_kept_to_it(http):
    body = {"prompt": ["aaa", "bbb"], "n": 2, "structured_outputs": {"choice": ["aa", "bb"]}}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["aa", "aa", "bb", "bb"]


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one .* not regex and choice"),
        ({"json_object": False}, "json_object"),
        ({"jsn": {}}, "no 'jsn'"),
        ({"regex": 5}, "regex is a int"),
        ({"regex": ""}, "regex is empty"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"choice": []}, "one or more"),
        ({"choice": ["a", ""]}, "non-empty"),
        ({"choice": "ab"}, "choice is a str"),
        ({"grammar": "start: start"}, "no answer"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": "root ::= nowhere"}, "nowhere"),
        ({"grammar": 'root ::= "a"' + " " * 9000}, "the limit is 8192"),
        ({"json": {"type": "strange"}}, "strange"),
        ({"json": {"not": {}}}, "not"),
        ({"json": "{"}, "not JSON"),
        ({"json": "3"}, "a schema is"),
        ({"json": json.dumps(NESTED)}, "the limit is 64"),
        ({"json": {"$ref": "#"}}, "no answer"),
        ({"json": {"$ref": "http://127.0.0.1/x"}}, "127.0.0.1"),
        ({"json": {"enum": [f"value {i}" for i in range(40000)]}}, "the limit is 262144"),
        ({"json": False}, "not"),
        ({"json": {"x-guidance": 5}}, "x-guidance"),
        ({"regex": "a", "disable_any_whitespace": True}, "apply to JSON"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "leaves nothing"),
        ({"regex": "a", "disable_additional_properties": True}, "applies to a schema"),
        ({"json": {}, "whitespace_pattern": "("}, "invalid regex|unclosed"),
        ({"structural_tag": {}}, "structures"),
        ({"structural_tag": {"structures": [], "triggers": []}}, "one or more"),
        ({"structural_tag": {"structures": TAG["structures"], "triggers": ["<g"]}}, "no trigger"),
        ({"structural_tag": {"structures": [{"begin": 1}], "triggers": ["<"]}}, "begin"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(http, outputs, said):
    response = http.post("/v1/completions", json={"prompt": "a", "structured_outputs": outputs})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "structured_outputs"
    assert re.search(said, error["message"]), error["message"]
    assert len(error["message"]) < 1000


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"response_format": {}}, "response_format", "type is None"),
        ({"response_format": {"type": "yaml"}}, "response_format", "'yaml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format",
            "missing",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {}, "strict": "yes"},
                }
            },
            "response_format",
            "strict",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"type": "strange"}},
                }
            },
            "response_format",
            "strange",
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {}}},
            "response_format",
            "structures and triggers",
        ),
        (
            {
                "response_format": {"type": "json_object"},
                "structured_outputs": {"json_object": True},
            },
            "structured_outputs",
            "both",
        ),
        ({"structured_outputs": ["a"]}, "structured_outputs", ""),
        ({"guided_json": {}}, "guided_json", "use structured_outputs.json"),
        ({"guided_regex": "a"}, "guided_regex", "use structured_outputs.regex"),
        ({"guided_choice": ["a"]}, "guided_choice", "use structured_outputs.choice"),
        ({"guided_grammar": "a"}, "guided_grammar", "use structured_outputs.grammar"),
        ({"guided_json_object": True}, "guided_json_object", "structured_outputs.json_object"),
        (
            {"guided_whitespace_pattern": " "},
            "guided_whitespace_pattern",
            "structured_outputs.whitespace_pattern",
        ),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "not supported"),
        (
            {"structured_outputs": {"regex": "a"}, "use_beam_search": True, "n": 2},
            "structured_outputs",
            "use_beam_search",
        ),
        (
            {"response_format": {"type": "json_object"}, "use_beam_search": True, "n": 2},
            "response_format",
            "use_beam_search",
        ),
    ],
)
def test_a_bad_field_is_refused_in_both_endpoints(http, body, param, said):
    for path, prompt in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        response = http.post(path, json={**prompt, **body})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert said in error["message"]


def test_after_a_refusal_others_go_on(http):
    assert complete(http, "ab", max_tokens=4)["text"] == "abab"
