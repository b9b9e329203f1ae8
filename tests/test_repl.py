"""The `chat` command against a server of canned answers."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxserve.errors import JaxserveError
from jaxserve.options import ChatOptions, CompleteOptions
from jaxserve.repl import chat_with_server, complete_with_server


@contextmanager
def canned_server(bodies, events):
    """Yields the URL of a server that streams `events` and keeps the bodies it gets."""

    class Canned(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(json.dumps({"data": [{"id": "canned"}]}))

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._send("".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]))

        def _send(self, text):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Canned) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def delta(text):
    return json.dumps({"choices": [{"delta": {"content": text}}]})


ANSWER = [json.dumps({"choices": [{"delta": {"role": "assistant"}}]}), delta("Hel"), delta("lo")]


def say(monkeypatch, *lines):
    left = iter(lines)

    def read(prompt):
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_one_quick_message_prints_the_answer_alone(capsys):
    bodies = []
    with canned_server(bodies, ANSWER) as url:
        options = ChatOptions(url=f"{url}/v1", quick="Hi", system_prompt="Be brief.")
        assert chat_with_server(options) == 0
    assert capsys.readouterr().out == "Hello\n"
    assert bodies[0]["model"] == "canned"
    assert bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_a_conversation_is_sent_whole_and_reset_forgets_it(monkeypatch, capsys):
    bodies = []
    say(monkeypatch, "one", "", "two", "/reset", "three")
    with canned_server(bodies, ANSWER) as url:
        assert chat_with_server(ChatOptions(url=url)) == 0
    said = [[message["content"] for message in body["messages"]] for body in bodies]
    assert said == [["one"], ["one", "Hello", "two"], ["three"]]


def test_an_error_in_the_stream_leaves_no_trace_in_the_conversation(monkeypatch, capsys):
    bodies = []
    say(monkeypatch, "one", "two", "/quit", "never")
    with canned_server(bodies, [json.dumps({"error": {"message": "broken"}})]) as url:
        assert chat_with_server(ChatOptions(url=url)) == 0
    assert [len(body["messages"]) for body in bodies] == [1, 1]
    assert "jaxserve: error: broken" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(JaxserveError, match="no answer from http://127.0.0.1:1"):
        chat_with_server(ChatOptions(url="http://127.0.0.1:1"))


def test_complete_goes_on_with_each_text(monkeypatch, capsys):
    bodies = []
    events = [json.dumps({"choices": [{"text": text}]}) for text in (" upon", " a time")]
    with canned_server(bodies, events) as url:
        assert complete_with_server(CompleteOptions(url=url, quick="Once", max_tokens=9)) == 0
        assert capsys.readouterr().out == " upon a time\n"
        say(monkeypatch, "Twice", "/quit")
        assert complete_with_server(CompleteOptions(url=f"{url}/v1", temperature=0.0)) == 0
    assert " upon a time\n" in capsys.readouterr().out
    assert bodies == [
        {"model": "canned", "prompt": "Once", "max_tokens": 9, "stream": True},
        {"model": "canned", "prompt": "Twice", "max_tokens": 128, "stream": True, "temperature": 0},
    ]
