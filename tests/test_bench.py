"""The benchmark's client, its figures, and a run against a server with known times."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from jaxserve.address import parse_server
from jaxserve.bench.client import EventParser, exchange
from jaxserve.bench.offline import random_prompts
from jaxserve.bench.report import RequestResult, save, serve_figures, serve_table
from jaxserve.bench.serve import measure
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.options import ServeBenchOptions

EVENTS = (b"data: one\n\n", b": comment\n\ndata:two\n\n", b"data: [DONE]\n\n")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = (
    HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x;ext\r\n%s\r\n" % (len(event), event) for event in EVENTS)
    + b"0\r\n\r\n"
)


def feed_in_pieces(data, size):
    parser = EventParser()
    events = []
    for start in range(0, len(data), size):
        events += parser.feed(data[start : start + size])
    return parser, events


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_bytes_arrive(size):
    parser, events = feed_in_pieces(CHUNKED, size)
    assert (parser.status, parser.is_done) == (200, True)
    assert events == [b"one", b"two", b"[DONE]"]


def test_a_stream_without_chunks_ends_with_the_connection():
    parser, events = feed_in_pieces(HEAD + b"\r\n" + b"".join(EVENTS), 5)
    assert events == [b"one", b"two", b"[DONE]"]
    assert not parser.is_done


def test_a_body_that_is_no_stream_is_kept():
    head = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\ncontent-type: application/json\r\n"
    parser, events = feed_in_pieces(head + b"\r\n{}", 4)
    assert (parser.status, bytes(parser.body), parser.is_done, events) == (400, b"{}", True, [])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h", ("h", 80, "", False)),
        ("http://h:81/v1/", ("h", 81, "", False)),
        ("https://h/a/v1", ("h", 443, "/a", True)),
        ("http://[::1]:9", ("::1", 9, "", False)),
    ],
)
def test_a_servers_url_may_end_in_v1(url, expected):
    server = parse_server(url)
    assert (server.host, server.port, server.path, server.is_tls) == expected


@pytest.mark.parametrize("url", ["", "h:80", "ftp://h", "http://", "http://h:x"])
def test_what_is_no_url_is_an_error(url):
    with pytest.raises(ConfigError, match="is not a URL"):
        parse_server(url)


def result(**changes):
    values = dict(prompt_tokens=4, output_tokens=3, ttft_s=0.1, itl_s=(0.2, 0.2), e2el_s=0.5)
    return RequestResult(**{**values, **changes})


def test_figures_are_what_vllm_calls_them():
    figures = serve_figures([result(), result(ttft_s=0.3, e2el_s=0.9)], 1, 2.0)
    assert figures["completed"] == 2
    assert figures["failed"] == 1
    assert figures["request_throughput"] == 1.0
    assert figures["output_throughput"] == 3.0
    assert figures["total_token_throughput"] == 7.0
    assert figures["mean_ttft_ms"] == pytest.approx(200)
    assert figures["median_tpot_ms"] == pytest.approx(250)
    assert figures["p99_itl_ms"] == pytest.approx(200)
    assert figures["mean_e2el_ms"] == pytest.approx(700)


def test_one_token_has_no_time_between_tokens():
    figures = serve_figures([result(output_tokens=1, itl_s=(), e2el_s=0.1)], 0, 1.0)
    assert "mean_tpot_ms" not in figures
    assert "Time per Output Token" not in serve_table(figures)


def test_the_table_has_the_columns_of_vllm_bench():
    table = serve_table(serve_figures([result()], 0, 1.0))
    assert "Output token throughput (tok/s):              3.00" in table
    for name in ("TTFT", "TPOT", "ITL", "E2EL"):
        for statistic in ("Mean", "Median", "P99"):
            assert f"{statistic} {name} (ms):" in table


def test_figures_are_saved_as_json(tmp_path):
    save("", {"a": 1})
    save(str(tmp_path / "f.json"), {"a": 1})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": 1}


def test_random_prompts_have_their_length_and_repeat_with_their_seed():
    prompts = random_prompts(3, 5, seed=1)
    assert [len(prompt) for prompt in prompts] == [5, 5, 5]
    assert prompts == random_prompts(3, 5, seed=1) != random_prompts(3, 5, seed=2)


class FakeServer:
    """Answers completions with one token each `step_s`; counts what runs at once."""

    def __init__(self, step_s=0.0, failing=0):
        self.step_s = step_s
        self.failing = failing  # this many requests are answered with 500
        self.bodies = []
        self.num_running = 0
        self.most_running = 0

    async def answer(self, reader, writer):
        try:
            await self._answer(reader, writer)
        finally:
            writer.close()

    async def _answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET /v1/models "):
            await self._send_json(writer, 200, {"data": [{"id": "fake"}]})
            return
        assert head.startswith("POST /v1/completions "), head
        length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.bodies.append(body)
        if self.failing:
            self.failing -= 1
            await self._send_json(writer, 500, {"error": {"message": "out of luck"}})
            return
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await self._send_stream(writer, body)
        self.num_running -= 1

    async def _send_json(self, writer, status, document):
        text = json.dumps(document).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)
        await writer.drain()

    async def _send_stream(self, writer, body):
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for index in range(body["max_tokens"]):
            await asyncio.sleep(self.step_s)
            is_last = index == body["max_tokens"] - 1
            choice = {"text": "x", "finish_reason": "length" if is_last else None}
            self._write_event(writer, json.dumps({"choices": [choice]}))
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self._write_event(writer, json.dumps({"choices": [], "usage": usage}))
        self._write_event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _write_event(self, writer, text):
        event = f"data: {text}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))


@asynccontextmanager
async def listening(fake):
    server = await asyncio.start_server(fake.answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def bench(fake, **options):
    async def run():
        async with listening(fake) as url:
            return await measure(ServeBenchOptions(base_url=url, **options))

    return asyncio.run(run())


def test_a_run_measures_the_times_that_the_server_takes():
    fake = FakeServer(step_s=0.02)
    figures, errors = bench(fake, num_prompts=4, random_input_len=7, random_output_len=5)
    assert errors == []
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (28, 20)
    assert 20 <= figures["median_ttft_ms"] < 90
    assert 20 <= figures["mean_itl_ms"] < 50
    assert 20 <= figures["median_tpot_ms"] < 50
    assert 100 <= figures["median_e2el_ms"] < 300


def test_requests_carry_what_was_asked_and_no_two_prompts_are_equal():
    fake = FakeServer()
    bench(fake, num_prompts=3, random_input_len=7, random_output_len=2, ignore_eos=True)
    prompts = [body.pop("prompt") for body in fake.bodies]
    assert len(prompts) == 4  # one to warm up
    assert len(set(map(tuple, prompts))) == 4
    assert all(len(prompt) == 7 for prompt in prompts)
    assert fake.bodies[0] == {
        "model": "fake",
        "max_tokens": 2,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def test_no_more_than_the_given_number_run_at_once():
    fake = FakeServer(step_s=0.01)
    bench(fake, num_prompts=9, random_output_len=2, max_concurrency=3)
    assert fake.most_running == 3


def test_the_request_rate_spreads_the_requests():
    figures, _ = bench(FakeServer(), num_prompts=20, random_output_len=1, request_rate=100.0)
    assert 0.05 < figures["duration"] < 1.0


def test_failed_requests_are_counted_and_say_why():
    fake = FakeServer(failing=2)
    figures, errors = bench(fake, num_prompts=5, random_output_len=2, num_warmups=0)
    assert (figures["completed"], figures["failed"]) == (3, 2)
    assert errors[0] == "500: out of luck"


def test_a_run_ends_at_its_timeout():
    fake = FakeServer(step_s=0.05)
    figures, errors = bench(fake, num_prompts=2, random_output_len=1000, num_warmups=0, timeout=0.2)
    assert figures["failed"] == 2
    assert errors[0] == "not finished after 0.2 s"


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(JaxserveError, match="no model server at 127.0.0.1:1"):
        asyncio.run(
            measure(ServeBenchOptions(base_url="http://127.0.0.1:1", ready_check_timeout_sec=0.0))
        )


def test_a_warm_up_ends_at_the_timeout():
    with pytest.raises(JaxserveError, match=r"did not finish in 0\.2 s"):
        bench(FakeServer(step_s=0.05), num_prompts=1, random_output_len=1000, timeout=0.2)


def test_a_connection_closed_early_is_an_error():
    async def hang_up(reader, writer):
        writer.close()

    async def run():
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await exchange(parse_server(f"http://127.0.0.1:{port}"), "/v1/models")

    with pytest.raises(ConnectionError):
        asyncio.run(run())
