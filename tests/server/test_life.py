"""The application as any ASGI host sees it: its lifespan owns an engine process."""

import asyncio
import os
import signal
import time

import httpx2
import pytest

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.errors import NotReady
from jaxserve.server import build_app
from jaxserve.server.http import bind, http_server
from jaxserve.server.main import _Process
from tests.checkpoints import write_llama_folder
from tests.server.processes import children_of
from tests.server.serving import echo_command
from tests.waiting import until

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
    return children_of("self")


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
        await until(lambda: children() - before)
    assert children() == before


async def test_shutdown_waits_for_running_requests(model):
    app = app_over_echo(model, step_s=0.01, max_model_len=1000)
    async with client_of(app) as http:
        async with app.router.lifespan_context(app):
            await app.state.life.wait_ready()
            running = asyncio.create_task(complete(http, 50))
            await until(lambda: app.state.server.num_running)
        assert (await running).json()["usage"]["completion_tokens"] == 50
        assert (await complete(http, 4)).status_code == 503


async def test_shutdown_waits_no_longer_than_it_may(model):
    app = app_over_echo(model, shutdown_timeout=0.2, step_s=0.01, max_model_len=10**6)
    async with client_of(app) as http:
        async with app.router.lifespan_context(app):
            await app.state.life.wait_ready()
            running = asyncio.create_task(complete(http, 10**5))
            await until(lambda: app.state.server.num_running)
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


async def reasons_of_closing(app, after) -> list[str | None]:
    """Returns why the engine was told to end, by a host that leaves once `after` has returned."""
    reasons = []
    async with app.router.lifespan_context(app):
        await until(lambda: app.state.server.engine is not None)
        engine = app.state.server.engine
        close = engine.close
        engine.close = lambda reason=None: (reasons.append(reason), close(reason))[1]
        await after()
    return reasons


async def test_an_engine_whose_front_fails_hears_why(model, tmp_path):
    app = build_app(
        EngineConfig(model=str(model)),
        ServerConfig(chat_template="{% for %}"),
        engine_command=echo_command(vocab_size=64),
    )
    (reason,) = await reasons_of_closing(app, app.state.life.is_over.wait)
    assert "template" in reason


async def test_an_engine_whose_front_drains_ends_in_order(model):
    app = app_over_echo(model, shutdown_timeout=0.1, step_s=0.01, max_model_len=10**6)
    life = app.state.life

    async def drain_in_vain():
        await life.wait_ready()
        async with client_of(app) as http:
            running = asyncio.create_task(complete(http, 10**5))
            await until(lambda: app.state.server.num_running)
            await life.drain()
            await running
        await life.is_over.wait()

    assert await reasons_of_closing(app, drain_in_vain) == [None]


async def test_a_server_whose_http_ends_does_not_stay(model):
    before = children()
    app = app_over_echo(model)
    sock = bind("127.0.0.1", 0)
    sock.close()
    process = _Process(app.state.life, http_server(app, app.state.server.config))
    with pytest.raises(OSError):
        await asyncio.wait_for(process.run(sock), 30)
    assert app.state.life.is_over.is_set() and children() == before
