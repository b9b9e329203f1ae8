"""Connections that leave, stall or send too much; nothing of theirs may stay behind."""

import json
import socket
import time

import httpx2
import pytest

from jaxserve.config import ServerConfig
from tests.server.serving import EchoServer


def wait_until(condition, timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def post(server: EchoServer, path: str, body: dict) -> socket.socket:
    """Returns a connection on which the request was sent and nothing has been read."""
    content = json.dumps(body).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    sock.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_sequences(stream):
    with EchoServer(step_s=0.01, max_model_len=10**6) as server:
        body = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 10**5, "stream": stream}
        with post(server, "/v1/completions", body) as sock:
            wait_until(lambda: server.link.engine.stats().num_running == 4)
            if stream:
                assert sock.recv(100).startswith(b"HTTP/1.1 200")
        start_s = time.monotonic()
        wait_until(lambda: server.link.engine.stats().num_running == 0)
        assert time.monotonic() - start_s < 1
        assert len(server.link.engine.aborted) == 4
        wait_until(lambda: server.state.num_running == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_of_another_protocol_that_leaves_aborts_its_sequence(stream):
    with EchoServer(step_s=0.01, max_model_len=10**6) as server:
        asked = {"max_tokens": 10**5, "max_output_tokens": 10**5, "stream": stream}
        hi = [{"role": "user", "content": "hi"}]
        for path, body in (("/v1/responses", {"input": hi}), ("/v1/messages", {"messages": hi})):
            with post(server, path, asked | body) as sock:
                wait_until(lambda: server.link.engine.stats().num_running == 1)
                if stream:
                    assert sock.recv(100).startswith(b"HTTP/1.1 200")
            wait_until(lambda: server.link.engine.stats().num_running == 0)
        assert len(server.link.engine.aborted) == 2
        wait_until(lambda: server.state.num_running == 0)


def test_a_stop_string_aborts_the_sequence_in_the_engine():
    with EchoServer(step_s=0.01) as server, httpx2.Client(base_url=server.url) as http:
        http.post("/v1/completions", json={"prompt": "ab", "stop": "b", "max_tokens": 100})
        wait_until(lambda: len(server.link.engine.aborted) == 1)


def test_an_engine_failure_in_a_stream_is_an_event_without_done():
    with (
        EchoServer(dies_at=ord("!"), step_s=0.02) as server,
        httpx2.Client(base_url=server.url) as http,
    ):
        body = {"prompt": "ab!", "max_tokens": 9, "stream": True}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 200
        last = response.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the step failed"
        assert "[DONE]" not in response.text
        # The streams hear of it first: the front still has to see the engine's thread end.
        wait_until(lambda: http.get("/health").status_code == 503)
        assert http.post("/v1/completions", json=body).status_code == 503


def test_headers_that_do_not_come_close_the_connection():
    with EchoServer(ServerConfig(header_timeout_s=0.2)) as server:
        for start in (b"", b"GET /health HTTP/1.1\r\nhost:"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
                sock.sendall(start)
                assert sock.recv(100) == b""


def test_a_slow_second_request_on_a_connection_is_closed_too():
    with (
        EchoServer(ServerConfig(header_timeout_s=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock,
    ):
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in sock.recv(1000)
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert sock.recv(1000) == b""


def test_a_long_answer_is_not_cut_by_the_header_timeout():
    config = ServerConfig(header_timeout_s=0.1)
    with EchoServer(config, step_s=0.05) as server, httpx2.Client(base_url=server.url) as http:
        reply = http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 10}).json()
        assert reply["usage"]["completion_tokens"] == 10


def test_a_slow_body_is_a_408():
    with EchoServer(ServerConfig(body_timeout_s=0.2)) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as slow:
            slow.sendall(head + b"content-length: 100\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_too_many_or_too_large_headers_are_refused():
    with EchoServer() as server, httpx2.Client(base_url=server.url) as http:
        many = {f"x-{number}": "1" for number in range(101)}
        assert http.get("/health", headers=many).status_code == 400
        assert http.get("/health", headers={"x": "1" * 66_000}).status_code == 400


def test_no_answer_names_the_server_software():
    with EchoServer() as server, httpx2.Client(base_url=server.url) as http:
        assert "server" not in http.get("/health").headers
