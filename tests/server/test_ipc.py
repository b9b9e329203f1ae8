"""The engine in another process: what arrives, what is refused, what happens at an end."""

import asyncio
import dataclasses
import functools
import socket
import sys
import threading
import time

import msgspec
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import ipc, wire
from jaxserve.engine.ipc import IpcClient
from jaxserve.engine.process import serve_ipc
from jaxserve.engine.repetition import RepetitionDetection
from jaxserve.engine.request import Request, SamplingParams, TokenLogprobs, Update
from jaxserve.engine.wire import (
    RequestFrame,
    Updates,
    front_decoder,
    pack_frame,
    pack_request,
    unpack_request,
)
from jaxserve.errors import ConfigError, EngineStopped, QueueFull, RequestError
from jaxserve.structured_outputs import Grammar
from tests.fakes import EchoEngine
from tests.server.serving import EchoLink, echo_command
from tests.waiting import until

pytestmark = pytest.mark.anyio


def request(name: str = "a", *, tokens: tuple[int, ...] = (1, 2, 3), **params: object) -> Request:
    return Request(
        request_id=name,
        prompt_tokens=tokens,
        params=SamplingParams(**params),  # type: ignore[arg-type]
    )


async def drain(stream) -> list[Update]:
    updates = []
    while not stream.is_finished:
        updates += await stream.take()
    return updates


def test_a_request_survives_the_wire_with_every_parameter():
    sent = Request(
        request_id="a",
        prompt_tokens=(1, 2),
        params=SamplingParams(
            n=2,
            temperature=0.5,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            typical_p=0.9,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.1,
            seed=2**62,
            max_tokens=None,
            min_tokens=1,
            stop=["x"],
            stop_token_ids=[3],
            include_stop_str_in_output=True,
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs=0,
            logit_bias={5: -1.5},
            allowed_token_ids=[1, 5],
            bad_words=["no"],
            bad_word_tokens=((1, 2), (3,)),
            structured_outputs=None,
            grammar=Grammar(source="start: /a/", param="tools", start_after_tokens=(3, 4)),
            detokenize=False,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            shown_special_tokens=("<tool_call>",),
            logprob_token_ids=[5, 6],
            repetition_detection=RepetitionDetection(max_pattern_size=4),
        ),
        priority=-3,
        cache_salt="salt",
        arrival_s=1.5,
    )
    frame = msgspec.msgpack.decode(msgspec.msgpack.encode(pack_request(sent)), type=RequestFrame)
    assert unpack_request(frame) == sent
    changed = {
        field.name
        for field in dataclasses.fields(SamplingParams)
        if getattr(sent.params, field.name) != field.default
    }
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert changed == names - {"structured_outputs"}  # the text side makes it a grammar


def test_an_update_survives_the_wire_with_every_field():
    logprobs = TokenLogprobs(token=1, logprob=-0.5, rank=1, top=((1, -0.5), (2, -1.5)))
    sent = Update(
        request_id="a",
        tokens=(1,),
        logprobs=(logprobs,),
        prompt_logprobs=(None, logprobs),
        finish_reason="stop",
        stop_token=1,
        is_complete=True,
        num_cached_tokens=16,
        error="no",
    )
    frame = pack_frame(Updates([sent]))
    assert front_decoder.decode(frame[4:]).updates == [sent]


async def test_a_request_is_answered_token_by_token():
    async with EchoLink().client() as client:
        assert client.info is not None and client.info.model == "echo"
        stream = await client.submit([request(max_tokens=4)])
        updates = await drain(stream)
    assert [token for update in updates for token in update.tokens] == [1, 2, 3, 1]
    assert updates[-1].finish_reason == "length"


async def test_a_slow_compiler_holds_up_nobody_else(monkeypatch):
    prepared = threading.Event()
    monkeypatch.setattr(EchoEngine, "prepare", lambda self, grammar: prepared.wait(10))
    monkeypatch.setattr(EchoEngine, "submit", functools.partialmethod(_submit_plainly))
    async with EchoLink().client() as client:
        grammar = Grammar(source="start: /a/")
        slow = asyncio.create_task(client.submit([request("slow", grammar=grammar)]))
        await drain(await client.submit([request("quick", max_tokens=4)]))
        assert not slow.done()
        gone = asyncio.create_task(client.submit([request("gone", grammar=grammar)]))
        await asyncio.sleep(0)
        gone.cancel()
        prepared.set()
        assert [update.request_id for update in await drain(await slow)][-1:] == ["slow"]
        assert (await client.stats()).num_running == 0


def _submit_plainly(engine, sent, submit=EchoEngine.submit):
    params = dataclasses.replace(sent.params, grammar=None)
    submit(engine, dataclasses.replace(sent, params=params))


async def test_updates_that_have_queued_arrive_as_one():
    async with EchoLink().client() as client:
        stream = await client.submit([request(max_tokens=50), request("b", max_tokens=50)])
        await asyncio.sleep(0.2)
        updates = await stream.take()
    assert [(update.request_id, len(update.tokens)) for update in updates] == [("a", 50), ("b", 50)]
    assert stream.is_finished


async def test_leaving_a_stream_aborts_its_requests():
    link = EchoLink(step_s=0.01)
    async with link.client() as client:
        async with await client.submit([request(max_tokens=None)]) as stream:
            await stream.take()
        await client.stats()
        assert link.engine.aborted == ["a"]


async def test_a_full_queue_refuses_all_the_requests_of_a_client():
    link = EchoLink(step_s=0.01, max_waiting=1)
    async with link.client() as client:
        with pytest.raises(QueueFull, match="1 requests wait"):
            await client.submit([request(max_tokens=None), request("b", max_tokens=None)])
        assert (await client.stats()).num_running == 0


async def test_progress_of_loading_reaches_the_log():
    link = EchoLink()
    async with link.client():
        assert link.lines == ["loading the echo"]


async def test_an_engine_that_cannot_start_says_why():
    ours, theirs = socket.socketpair()

    def make_engine(config, deliver, report) -> EchoEngine:
        raise ConfigError("the model does not fit")

    with theirs:
        serving = asyncio.create_task(asyncio.to_thread(serve_ipc, theirs, make_engine))
        client = await IpcClient.connect(ours, EngineConfig(), report=print)
        with pytest.raises(ConfigError, match="does not fit"):
            await client.wait_ready()
        await client.close()
        await serving


async def test_an_engine_error_ends_the_stream_and_the_client():
    async with EchoLink(dies_at=3).client() as client:
        updates = await drain(await client.submit([request()]))
        assert updates[-1].error == "the step failed"
        await asyncio.wait_for(client.stopped.wait(), 5)
        with pytest.raises(EngineStopped, match="the device is gone"):
            await client.submit([request("b")])


async def test_a_request_that_fails_alone_leaves_the_engine_running():
    async with EchoLink(fails_at=3).client() as client:
        updates = await drain(await client.submit([request()]))
        assert updates[-1].error == "the step failed"
        updates = await drain(await client.submit([request("b", tokens=(1, 2), max_tokens=2)]))
        assert updates[-1].finish_reason == "length"
        assert client.error is None


async def test_a_frame_that_is_too_large_refuses_its_request_alone(monkeypatch):
    async with EchoLink().client() as client:
        monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 2000)
        with pytest.raises(RequestError, match="the limit is 2000"):
            await client.submit([request(tokens=(1,) * 3000)])
        updates = await drain(await client.submit([request("b", max_tokens=2)]))
        assert updates[-1].finish_reason == "length"
        assert client.error is None


async def test_updates_that_are_too_large_fail_alone(monkeypatch):
    link = EchoLink(step_s=0.01)
    async with link.client() as client:
        monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1500)
        small = request("b", max_tokens=2)
        large = request(tokens=tuple(range(100)), prompt_logprobs=9, max_tokens=None)
        stream = await client.submit([large, small])
        last = {update.request_id: update for update in await drain(stream)}
        assert "the limit is 1500" in last["a"].error
        assert last["b"].finish_reason == "length"
        assert link.engine.aborted == ["a"]
        assert client.error is None


async def test_a_fault_while_reading_fails_what_waits(monkeypatch):
    async with EchoLink(step_s=0.01).client() as client:
        stream = await client.submit([request(max_tokens=None)])
        monkeypatch.setattr(client, "_deliver", lambda update: 1 / 0)
        updates = await asyncio.wait_for(drain(stream), 5)
        assert updates[-1].error == "reading from the engine failed: division by zero"
        assert client.stopped.is_set()


async def test_a_killed_engine_process_fails_streams_at_once():
    client = await IpcClient.start(EngineConfig(), report=print, command=echo_command(step_s=0.01))
    await asyncio.wait_for(client.wait_ready(), 30)
    stream = await client.submit([request(max_tokens=None)])
    client.kill()
    updates = await asyncio.wait_for(drain(stream), 5)
    assert updates[-1].error == "the engine process ended"
    assert client.stopped.is_set()
    await client.close()


async def test_the_engine_process_ends_when_its_front_does():
    client = await IpcClient.start(EngineConfig(), report=print, command=echo_command())
    await asyncio.wait_for(client.wait_ready(), 30)
    process = client._process
    assert process is not None
    client._writer.transport.abort()
    assert await asyncio.to_thread(process.wait, 10) == 0
    await client.close()


async def test_a_reason_to_close_comes_before_the_close():
    ours, theirs = socket.socketpair()
    heard = []

    def make_engine(config, deliver, report) -> EchoEngine:
        engine = EchoEngine(deliver)
        close = engine.close
        engine.close = lambda: (heard.append("closed"), close())[1]
        return engine

    with theirs:
        serving = asyncio.create_task(
            asyncio.to_thread(serve_ipc, theirs, make_engine, on_close=heard.append)
        )
        client = await IpcClient.connect(ours, EngineConfig(), report=print)
        await client.wait_ready()
        await client.close("the chat template is wrong")
        await serving
    assert heard == [wire.Close("the chat template is wrong"), "closed"]


# The engine process of a cluster without the cluster: it tells how that was ended.
MEMBER = """
import socket, sys
from jaxserve.engine import process
from jaxserve.engine.cluster import Place
from tests.fakes import EchoEngine

class Member:
    def __init__(self, place, config, report, on_end, *, on_heard):
        self.report = report

    def start(self, deliver):
        return EchoEngine(deliver)

    def end(self, reason=None):
        self.report(f"ended: {reason}")

process.Member = Member
place = Place(host="127.0.0.1", port=1, num_processes=2, process_id=0)
process._serve_member(socket.socket(fileno=int(sys.argv[1])), place)
"""


@pytest.mark.parametrize(("reason", "status"), [("the front failed", 1), (None, 0)])
async def test_a_cluster_ends_in_order_only_where_nothing_failed(reason, status):
    lines = []
    client = await IpcClient.start(
        EngineConfig(), report=lines.append, command=(sys.executable, "-c", MEMBER)
    )
    await asyncio.wait_for(client.wait_ready(), 30)
    await client.close(reason)
    assert client._process is not None and client._process.returncode == status
    assert lines == ([f"ended: {reason}"] if reason else [])


async def test_a_front_that_stood_still_does_not_blame_the_engine(monkeypatch):
    monkeypatch.setattr(ipc, "ALIVE_S", 0.2)
    link = EchoLink()
    async with link.client() as client:
        asked, stats = 0, link.engine.stats
        # The answer comes while the loop stands still, not before.
        monkeypatch.setattr(link.engine, "stats", lambda: (time.sleep(0.05), stats())[1])

        async def stand_still() -> None:
            nonlocal asked
            asked += 1
            if asked == 1:  # once the frame has left
                asyncio.get_running_loop().call_soon(time.sleep, 1.5)
            await IpcClient.stats(client)

        monkeypatch.setattr(client, "stats", stand_still)
        watching = asyncio.create_task(client._watch())
        await until(lambda: asked > 2 or watching.done())
        watching.cancel()
        assert client.error is None


async def test_an_engine_that_does_not_answer_is_ended(monkeypatch):
    monkeypatch.setattr(ipc, "ALIVE_S", 0.1)
    async with EchoLink().client() as client:
        monkeypatch.setattr(client, "stats", asyncio.Event().wait)
        await asyncio.wait_for(client._watch(), 5)
        assert client.error == "the engine process has not answered for 0 s"
