"""The application as any ASGI host sees it: its lifespan owns an engine process."""

import asyncio
import contextlib
import os
import signal
import time

import httpx2
import pytest

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.errors import NotReady
from jaxserve.server import build_app
from tests.checkpoints import write_llama_folder
from tests.server.serving import echo_command

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama_folder(tmp_path_factory.mktemp("model"))


def app_over_echo(model, *, load_s: float = 0.0, shutdown_timeout: float = 10.0, **engine):
    return build_app(
        EngineConfig(model=str(model)),
        ServerConfig(served_model_name=("echo",), shutdown_timeout=shutdown_timeout),
        engine_command=echo_command(load_s=load_s, vocab_size=64, **engine),
    )


def client_of(app) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://echo")


def children() -> set[int]:
    """Returns the processes that this one has started and that still run."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):  # the thread has ended since
            with open(f"/proc/self/task/{task}/children") as lines:
                found |= {int(pid) for pid in lines.read().split()}
    return found


async def complete(http: httpx2.AsyncClient, max_tokens: int) -> httpx2.Response:
    return await http.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": max_tokens})


async def test_startup_does_not_wait_for_the_model(model):
    app = app_over_echo(model, load_s=0.5)
    async with app.router.lifespan_context(app), client_of(app) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 503
        await app.state.life.wait_ready()
        assert (await http.get("/ready")).status_code == 200
        assert (await complete(http, 4)).json()["usage"]["completion_tokens"] == 4


async def test_shutdown_ends_the_engine_process(model):
    before = children()
    app = app_over_echo(model)
    async with app.router.lifespan_context(app):
        await app.state.life.wait_ready()
        assert len(children() - before) == 1
    assert children() == before


async def test_shutdown_while_loading_ends_the_engine_process(model):
    before = children()
    app = app_over_echo(model, load_s=60)
    async with app.router.lifespan_context(app):
        while not children() - before:
            await asyncio.sleep(0.01)
    assert children() == before


async def test_shutdown_waits_for_running_requests(model):
    app = app_over_echo(model, step_s=0.01, max_model_len=1000)
    async with client_of(app) as http:
        async with app.router.lifespan_context(app):
            await app.state.life.wait_ready()
            running = asyncio.create_task(complete(http, 50))
            while not app.state.server.num_running:
                await asyncio.sleep(0.01)
        assert (await running).json()["usage"]["completion_tokens"] == 50
        assert (await complete(http, 4)).status_code == 503


async def test_shutdown_waits_no_longer_than_it_may(model):
    app = app_over_echo(model, shutdown_timeout=0.2, step_s=0.01, max_model_len=10**6)
    async with client_of(app) as http:
        async with app.router.lifespan_context(app):
            await app.state.life.wait_ready()
            running = asyncio.create_task(complete(http, 10**5))
            while not app.state.server.num_running:
                await asyncio.sleep(0.01)
            start_s = time.monotonic()
        assert 0.2 <= time.monotonic() - start_s < 5
        assert "the server has shut down" in (await running).text


async def test_a_model_that_is_not_there_turns_health_to_503(tmp_path):
    app = app_over_echo(tmp_path / "nothing")
    async with app.router.lifespan_context(app), client_of(app) as http:
        with pytest.raises(NotReady, match="nothing"):
            await app.state.life.wait_ready()
        for path in ("/health", "/ready"):
            response = await http.get(path)
            assert response.status_code == 503
            assert "nothing" in response.json()["error"]["message"]


async def test_the_death_of_the_engine_turns_health_to_503(model):
    before = children()
    app = app_over_echo(model)
    async with app.router.lifespan_context(app), client_of(app) as http:
        await app.state.life.wait_ready()
        os.kill((children() - before).pop(), signal.SIGKILL)
        await asyncio.wait_for(app.state.life.is_over.wait(), 10)
        assert "the engine process ended" in (await http.get("/health")).text
        with pytest.raises(NotReady, match="the engine process ended"):
            await app.state.life.wait_ready()
