"""The factory that ASGI servers call: what JAXSERVE_CONFIG says, and a real uvicorn over it."""

import os
import signal
import sys

import httpx2
import pytest

from jaxserve import asgi
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.errors import ConfigError
from tests.checkpoints import write_llama_folder
from tests.server.processes import running


def write_config(folder, text: str) -> str:
    path = folder / "config.toml"
    path.write_text(text)
    return str(path)


def test_the_file_and_the_environment_become_the_application(tmp_path, monkeypatch):
    path = write_config(tmp_path, '[engine]\nmodel = "m"\n[server]\nserved_model_name = ["n"]\n')
    monkeypatch.setenv("JAXSERVE_CONFIG", path)
    monkeypatch.setenv("JAXSERVE_API_KEY", "k")
    state = asgi.create_app().state.server
    assert state.config == ServerConfig(served_model_name=("n",), api_key=("k",))
    assert (state.root, state.model_names) == ("m", ("n",))


def test_arguments_are_those_of_serve():
    engine, server = asgi.hosted_configs(["m", "--max-model-len", "4K", "--api-key", "k"])
    assert engine == EngineConfig(model="m", max_model_len=4096)
    assert server == ServerConfig(api_key=("k",))


def test_without_a_file_there_is_no_application(monkeypatch):
    monkeypatch.delenv("JAXSERVE_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="JAXSERVE_CONFIG is not set"):
        asgi.create_app()


@pytest.mark.parametrize("flag", ["--host=0.0.0.0", "--port=1", "--log-level=debug"])
def test_what_the_host_decides_is_refused(flag):
    with pytest.raises(ConfigError, match="the host of the application decides it"):
        asgi.hosted_configs([flag])


@pytest.mark.slow
def test_uvicorn_serves_a_model_from_the_factory_and_ends_its_engine(tmp_path):
    model = write_llama_folder(tmp_path / "model")
    sizes = "max_model_len = 64\nmax_num_seqs = 1\nmax_num_batched_tokens = 16\n"
    path = write_config(tmp_path, f'[engine]\nmodel = "{model}"\n{sizes}')
    command = [sys.executable, "-m", "uvicorn", "--factory", "jaxserve.asgi:create_app"]
    with running(
        [*command, "--port", "0"],
        listening=r"running on (http://\S+)",
        env={"JAXSERVE_CONFIG": path},
    ) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        server.wait_ready(120)
        body = {"prompt": "the quick", "max_tokens": 5, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            events = [line for line in response.iter_lines() if line]
        assert len(events) > 2 and events[-1] == "data: [DONE]"
        pid = server.process.pid
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            engine = int(children.read().split()[0])
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) in (0, -signal.SIGTERM)
        assert not os.path.exists(f"/proc/{engine}")
