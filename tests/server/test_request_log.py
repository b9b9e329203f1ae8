"""The line that each request leaves in the log, its forms, and the header that names it."""

import json
import logging

import httpx2
import pytest

from jaxserve.config import ServerConfig
from jaxserve.server.log import JsonFormatter, TextFormatter, configure_log
from tests.server.serving import EchoServer
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def http():
    config = ServerConfig(enable_log_requests=True, enable_request_id_headers=True)
    with EchoServer(config) as server, httpx2.Client(base_url=server.url) as client:
        yield client


def fields_of(caplog, count: int = 1) -> list[dict]:
    """Returns the fields of the requests' lines; one may come after its reply has been read."""

    def found() -> list[dict]:
        return [record.fields for record in caplog.records if record.name == "jaxserve.requests"]

    wait_until(lambda: len(found()) >= count)
    assert len(found()) == count
    return found()


def test_a_line_tells_counts_and_never_text(http, caplog):
    caplog.set_level(logging.INFO)
    body = {"prompt": "secret", "max_tokens": 3, "stop": "cr"}
    headers = {"X-Request-Id": "mine"}
    assert http.post("/v1/completions?q=1", json=body, headers=headers).status_code == 200
    (told,) = fields_of(caplog)
    seconds = told.pop("seconds")
    assert 0 < seconds < 10
    assert told == {
        "request_id": "mine", "method": "POST", "path": "/v1/completions", "status": 200,
        "prompt_tokens": 6, "completion_tokens": 3, "finish_reasons": ["length"],
    }  # fmt: skip
    assert "secret" not in caplog.text


def test_streams_and_refusals_leave_a_line_too(http, caplog):
    caplog.set_level(logging.INFO)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}
    http.post("/v1/chat/completions", json=body)
    http.post("/v1/chat/completions", json={})
    # A stream's line comes once it has been sent, which may be after the next request's.
    streamed, refused = sorted(fields_of(caplog, 2), key=lambda fields: fields["status"])
    assert (streamed["status"], streamed["completion_tokens"]) == (200, 2)
    assert (refused["status"], "prompt_tokens" in refused) == (400, False)


def test_probes_leave_no_line(http, caplog):
    caplog.set_level(logging.INFO)
    for path in ("/health", "/metrics", "/load"):
        assert http.get(path).status_code == 200
    fields_of(caplog, 0)


def test_the_header_names_the_request(http):
    body = {"prompt": "a", "max_tokens": 1}
    for given, named in (({"X-Request-Id": "mine"}, "mine"), ({}, None)):
        response = http.post("/v1/completions", json=body, headers=given)
        assert response.headers["x-request-id"] == response.json()["id"].removeprefix("cmpl-")
        assert named in (None, response.headers["x-request-id"])
    body["request_id"] = "other"
    assert http.post("/v1/completions", json=body).headers["x-request-id"] == "other"
    assert http.get("/health", headers={"X-Request-Id": "probe"}).headers["x-request-id"] == "probe"
    odd = http.get("/nothing", headers={"X-Request-Id": "a b"})
    assert len(odd.headers["x-request-id"]) == 32


def test_neither_line_nor_header_unless_asked_for(caplog):
    caplog.set_level(logging.INFO)
    with EchoServer() as server, httpx2.Client(base_url=server.url) as http:
        assert "x-request-id" not in http.get("/health").headers
    fields_of(caplog, 0)


def line(formatter: logging.Formatter, **fields) -> str:
    record = logging.LogRecord("jaxserve", logging.INFO, "f", 1, "%s", ("done",), None)
    record.fields = fields
    return formatter.format(record)


@pytest.mark.parametrize(("form", "is_json"), [("json", True), ("text", False)])
def test_the_log_takes_the_form_that_was_asked_for(monkeypatch, form, is_json):
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "root", root)
    configure_log(ServerConfig(log_format=form, log_level="error"))
    (handler,) = root.handlers
    assert isinstance(handler.formatter, JsonFormatter) == is_json
    assert root.level == logging.ERROR


def test_a_text_line_has_its_fields_behind_the_message():
    text = line(TextFormatter(), status=200, path="/a b\n", reasons=["stop", "length"])
    assert text.endswith('INFO done status=200 path="/a b\\n" reasons=stop,length')


def test_a_json_line_is_one_object():
    told = json.loads(line(JsonFormatter(), status=200, path="/a\nb"))
    assert (told["level"], told["message"], told["status"]) == ("info", "done", 200)
    assert told["path"] == "/a\nb"
    assert "\n" not in line(JsonFormatter(), path="/a\nb")
