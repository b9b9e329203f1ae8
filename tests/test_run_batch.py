"""The `run-batch` command over an echo engine in a process of its own."""

import json

import pytest

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.errors import ConfigError, NotReady
from jaxserve.options import BatchOptions
from jaxserve.run_batch import run_batch
from tests.checkpoints import write_llama_folder
from tests.server.serving import echo_command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama_folder(tmp_path_factory.mktemp("model"))


def line(custom_id: str, url: str = "/v1/completions", **body) -> str:
    asked = {"custom_id": custom_id, "method": "POST", "url": url}
    return json.dumps({**asked, "body": {"prompt": [5, 6], "max_tokens": 2, **body}})


def run(model, tmp_path, lines: list[str], **engine) -> dict[str, dict]:
    """Returns the replies by custom_id."""
    asked, told = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("\n".join(lines))
    status = run_batch(
        EngineConfig(model=str(model)),
        ServerConfig(served_model_name=("echo",), api_key=("of no use here",)),
        BatchOptions(input_file=str(asked), output_file=str(told)),
        engine_command=echo_command(vocab_size=1000, **engine),
    )
    assert status == 0
    return {reply["custom_id"]: reply for reply in map(json.loads, told.read_text().splitlines())}


def test_every_line_gets_its_reply(model, tmp_path):
    lines = [line(f"n{number}", prompt=[number, 9], max_tokens=1) for number in range(5, 25)]
    messages = [{"role": "user", "content": "hi"}]
    lines += ["", line("chat", "/v1/chat/completions", messages=messages)]
    lines.append(
        line("many", n=4, prompt=[[5], [6], [7]])
    )  # more than the queue holds, with others
    replies = run(model, tmp_path, lines, max_waiting=12)
    assert len(replies) == 22
    reply = replies["n7"]
    assert reply["error"] is None
    assert reply["response"]["status_code"] == 200
    body = reply["response"]["body"]
    assert body["usage"]["completion_tokens"] == 1
    assert body["id"] == f"cmpl-{reply['response']['request_id']}"
    assert replies["chat"]["response"]["body"]["object"] == "chat.completion"
    assert len(replies["many"]["response"]["body"]["choices"]) == 12


def test_a_line_that_is_refused_says_why(model, tmp_path):
    refused = {
        "hot": ({"temperature": 9}, 400, "temperature"),
        "unknown": ({"model": "gpt"}, 404, "model"),
        "streams": ({"stream": True}, 400, "body.stream"),
        "elsewhere": ({"url": "/v1/embeddings"}, 400, "url"),
    }
    replies = run(model, tmp_path, [line(name, **asked) for name, (asked, *_) in refused.items()])
    for name, (_, status, param) in refused.items():
        reply = replies[name]
        assert reply["response"]["status_code"] == status
        assert reply["response"]["body"] is None
        assert (reply["error"]["param"], reply["error"]["code"]) == (param, status)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: "),
        ([line("a"), "{}"], "line 2: Object missing required field `custom_id`"),
        ([line("a"), "", line("a")], "line 3: custom_id 'a' is used twice"),
        ([line("a").replace("POST", "GET")], "line 1: Invalid enum value 'GET'"),
    ],
)
def test_a_file_that_is_no_batch_is_an_error_before_anything_loads(tmp_path, lines, message):
    with pytest.raises(ConfigError, match=message):
        run("nowhere", tmp_path, lines)
    with pytest.raises(ConfigError, match="cannot be read"):
        run_batch(EngineConfig(), ServerConfig(), BatchOptions(input_file=str(tmp_path / "none")))


def test_the_death_of_the_engine_ends_the_batch(model, tmp_path):
    with pytest.raises(NotReady, match="stopped"):
        run(model, tmp_path, [line(str(number), prompt=[9]) for number in range(9)], dies_at=9)
