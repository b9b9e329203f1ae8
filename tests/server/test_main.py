"""The server as processes: loading, draining, and what the end of either process does."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from jaxserve.config import ServerConfig
from jaxserve.engine.cluster import Place
from jaxserve.errors import ConfigError
from jaxserve.server import follower
from jaxserve.server.http import address_of, bind
from tests.checkpoints import write_llama_folder
from tests.server.processes import ServerProcess, free_port, running
from tests.server.serving import echo_command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_llama_folder(folder)
    return folder


def serve(model, *, shutdown_timeout: float = 10.0, load_s: float = 0.0, **engine):
    """Returns a running server whose engine process runs the echo engine."""
    code = (
        "import sys; from jaxserve.config import EngineConfig, ServerConfig;"
        "from jaxserve.server.main import run;"
        f"sys.exit(run(EngineConfig(model={str(model)!r}),"
        f"ServerConfig(port=0, served_model_name=('echo',), shutdown_timeout={shutdown_timeout}),"
        f"engine_command={echo_command(load_s=load_s, vocab_size=64, **engine)!r}))"
    )
    return running([sys.executable, "-c", code])


def post(server: ServerProcess, **body) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/completions", json={"prompt": [5, 6], **body}, timeout=20)


class InBackground:
    """A streamed completion that another thread reads."""

    def __init__(self, server: ServerProcess, max_tokens: int) -> None:
        self.text = ""
        self.is_started = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(server.url, max_tokens))
        self._thread.start()
        assert self.is_started.wait(10)

    def _read(self, url: str, max_tokens: int) -> None:
        body = {"prompt": [5, 6], "max_tokens": max_tokens, "stream": True}
        with (
            contextlib.suppress(httpx2.RemoteProtocolError),  # the server was killed
            httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response,
        ):
            for text in response.iter_text():
                self.text += text
                self.is_started.set()

    def finish(self) -> str:
        self._thread.join(20)
        return self.text


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def engine_pid(server: ServerProcess) -> int:
    with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children") as children:
        return int(children.read().split()[0])


def test_the_server_answers_while_it_loads(model):
    with serve(model, load_s=1.0) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        response = post(server)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        server.wait_ready(20)
        assert post(server).status_code == 200
        assert any("loading" in line for line in server.log)


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(model):
    with serve(model, step_s=0.02, max_model_len=1000) as server:
        server.wait_ready(20)
        pid = engine_pid(server)
        stream = InBackground(server, max_tokens=60)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("(SIGTERM)", 5)
        assert post(server).status_code == 503
        assert httpx2.get(f"{server.url}/ready").status_code == 503
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert stream.finish().endswith("data: [DONE]\n\n")
        assert server.process.wait(10) == 0
        assert not is_alive(pid)


def test_a_drain_that_takes_too_long_ends_streams_with_an_error(model):
    with serve(model, shutdown_timeout=0.3, step_s=0.02, max_model_len=10**6) as server:
        server.wait_ready(20)
        stream = InBackground(server, max_tokens=10**5)
        start_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert time.monotonic() - start_s < 4
        text = stream.finish()
        assert "the server has shut down" in text and "[DONE]" not in text


def test_a_second_signal_ends_both_processes_at_once(model):
    with serve(model, step_s=0.02, max_model_len=10**6) as server:
        server.wait_ready(20)
        pid = engine_pid(server)
        stream = InBackground(server, max_tokens=10**5)
        server.process.send_signal(signal.SIGINT)
        server.wait_for_line("(SIGINT)", 5)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(5) == 128 + signal.SIGINT
        assert not is_alive(pid)
        assert "[DONE]" not in stream.finish()


def test_a_signal_does_not_wait_for_a_model_that_is_being_found(model):
    code = (
        "import sys, time; from jaxserve.config import EngineConfig, ServerConfig;"
        "from jaxserve.server import life, main;"
        "life.find_model = lambda config: time.sleep(60);"
        "sys.exit(main.run(EngineConfig(), ServerConfig(port=0)))"
    )
    with running([sys.executable, "-c", code]) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0


def test_the_death_of_the_engine_ends_the_server_with_an_error(model):
    with serve(model, step_s=0.02, max_model_len=10**6) as server:
        server.wait_ready(20)
        stream = InBackground(server, max_tokens=10**5)
        os.kill(engine_pid(server), signal.SIGKILL)
        text = stream.finish()
        assert "the engine process ended" in text and "[DONE]" not in text
        assert httpx2.get(f"{server.url}/health").status_code == 503
        assert server.process.wait(10) == 1


def test_the_death_of_the_front_ends_the_engine(model):
    with serve(model) as server:
        server.wait_ready(20)
        pid = engine_pid(server)
        server.process.kill()
        deadline_s = time.monotonic() + 10
        while is_alive(pid):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def test_a_model_that_is_not_there_ends_the_server_with_an_error(tmp_path):
    with serve(tmp_path / "nothing") as server:
        assert server.process.wait(20) == 1
        assert any("nothing" in line for line in server.log)


def test_a_port_that_is_taken_is_an_error_that_says_so(model):
    with serve(model) as server:
        server.wait_ready(20)
        port = server.url.rsplit(":", 1)[1]
        code = (
            "from jaxserve.config import EngineConfig, ServerConfig;"
            "from jaxserve.errors import ConfigError; from jaxserve.server.main import run\n"
            f"try: run(EngineConfig(), ServerConfig(port={port}))\n"
            f"except ConfigError as error: assert 'port {port}' in str(error)\n"
            "else: raise SystemExit(1)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_port_belongs_to_whoever_bound_it_first():
    with bind("127.0.0.1", 0) as sock:
        with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1 port"):
            bind("127.0.0.1", sock.getsockname()[1])


def follower_place(host="127.0.0.1"):
    return Place(host=host, port=1, num_processes=2, process_id=1)


def test_a_follower_leaves_the_port_to_a_process_0_of_its_host():
    config = ServerConfig(port=free_port())
    assert follower._health_socket(config, follower_place("localhost")) is None
    with follower._health_socket(config, follower_place("192.0.2.1")) as sock:  # no host has it
        assert sock.getsockname()[1] == config.port
        assert follower._health_socket(config, follower_place("192.0.2.1")) is None
    with follower._health_socket(ServerConfig(health_port=0), follower_place()) as sock:
        assert address_of(sock).startswith("http://127.0.0.1:")


def test_a_signal_ends_a_follower_that_has_not_heard_process_0():
    code = (
        "import sys; from jaxserve.config import EngineConfig, ServerConfig;"
        "from jaxserve.server.follower import follow; from jaxserve.engine.cluster import Place;"
        "import logging; logging.basicConfig(level='INFO');"
        f"sys.exit(follow(EngineConfig(), ServerConfig(health_port=0), {follower_place()!r},"
        f" {echo_command(load_s=60)!r}))"
    )
    with running([sys.executable, "-c", code]) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        server.wait_for_line("(loading)", 10)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert "ends before process 0 was there" in "".join(server.log)
