"""Replicas under a local Ray: streams through its proxy, one replica killed under load."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import httpx2
import pytest

from jaxserve.errors import ConfigError
from jaxserve.ray_serve import actor_options, replica_options, scaling
from tests.checkpoints import write_llama_folder
from tests.server.processes import children_of, free_port, running
from tests.waiting import wait_until

NUM_STREAMS = 8
MAX_TOKENS = 400


def test_options_come_as_texts_or_as_values():
    texts = replica_options({"replicas": "2", "cpus": "0.5", "serve": "demo --page-size 8"})
    assert texts == replica_options({"replicas": 2, "cpus": 0.5, "serve": "demo --page-size 8"})
    assert (texts.replicas, texts.cpus) == (2, 0.5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"replica": 2}, "unknown option 'replica'; did you mean 'replicas'?"),
        ({"replicas": 0}, "replicas is 0; it must be at least 1"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas is 2; it must be at least replicas, 3"),
    ],
)
def test_a_wrong_option_is_refused(args, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        replica_options(args)


def test_options_become_reservations_and_scaling():
    options = replica_options({"tpus": 8, "accelerator_type": "TPU-V5E", "cpus": 4})
    assert actor_options(options) == {
        "num_cpus": 4.0,
        "num_gpus": 0,
        "resources": {"TPU": 8},
        "accelerator_type": "TPU-V5E",
    }
    assert scaling(options) == {"num_replicas": 1}
    bounds = scaling(replica_options({"max_replicas": 4, "target_ongoing_requests": 10}))
    assert bounds["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 10.0,
    }


# A replica without Ray: its lifespan, its health, and what it does when the engine ends.
HOSTED = """
import asyncio, sys
from jaxserve import ray_serve
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.server import build_app
from tests.server.serving import echo_command

class Hosted(ray_serve.Replica):
    app = build_app(EngineConfig(model=sys.argv[1]), ServerConfig(), engine_command=echo_command())

async def live():
    async with Hosted.app.router.lifespan_context(Hosted.app):
        replica = Hosted()
        await replica.check_health()
        print("healthy", flush=True)
        if sys.argv[2] == "kill":
            Hosted.app.state.server.engine.kill()
            await asyncio.sleep(30)
        await replica.check_health()

ray_serve.DEAD_GRACE_S = 0.01
asyncio.run(live())
"""


def host(model, then):
    """Returns the exit status of a replica's process and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTED, str(model), then], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_a_replica_ends_with_its_engine_and_not_before(tmp_path):
    model = write_llama_folder(tmp_path / "model")
    assert host(model, "end")[:2] == (0, "healthy\n")
    assert host(model, "kill")[:2] == (1, "healthy\n")


def test_a_replica_that_cannot_load_says_why(tmp_path):
    status, out, log = host(tmp_path / "nothing", "end")
    assert (status, out) == (1, "")
    assert "NotReady" in log and str(tmp_path / "nothing") in log


class Stream:
    """A streamed completion that another thread reads."""

    def __init__(self, url: str) -> None:
        self.text = ""
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()

    @property
    def num_events(self) -> int:
        return self.text.count("data: ")

    @property
    def is_whole(self) -> bool:
        return self.text.endswith("data: [DONE]\n\n")

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _read(self, url: str) -> None:
        body = {"prompt": "the", "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True}
        with (
            contextlib.suppress(httpx2.TransportError),  # its replica was killed
            httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response,
        ):
            for text in response.iter_text():
                self.text += text


def descendants(pid: int) -> dict[int, str]:
    """Returns the command of each process below `pid`."""
    found = {}
    for child in children_of(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
        found |= descendants(child)
    return found


def complete(url: str) -> int:
    body = {"prompt": "the", "max_tokens": 4, "ignore_eos": True}
    return httpx2.post(f"{url}/v1/completions", json=body, timeout=60).status_code


def finished(url: str) -> dict[str, float]:
    """Returns how many requests ended, by reason, in the replica that answers."""
    lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
    return {
        line.split('finished_reason="')[1].split('"')[0]: float(line.split()[-1])
        for line in lines
        if line.startswith("jaxserve:request_success_total{")
    }


@pytest.fixture
def cluster(tmp_path):
    """A cluster with two replicas; its folder's path is short, as Ray's sockets are in it."""
    model = write_llama_folder(
        tmp_path / "model", layers=1, hidden=32, ffn=32, max_position_embeddings=512
    )
    sizes = "--max-num-seqs 4 --max-num-batched-tokens 4"
    arguments = f"{model} {sizes} --compile-cache-dir {tmp_path / 'cache'}"
    options = json.dumps({"replicas": 2, "cpus": 0.5, "serve": arguments})
    folder = tempfile.mkdtemp(prefix="ray")
    command = [sys.executable, "-m", "tests.deployment.ray_driver", options, str(free_port())]
    try:
        with running(
            [*command, folder], listen_timeout_s=240, env={"RAY_USAGE_STATS_ENABLED": "0"}
        ) as driver:
            yield driver
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_killed_replica_takes_no_request_of_the_other_with_it(cluster):
    processes = descendants(cluster.process.pid)
    replicas = [pid for pid, command in processes.items() if command.startswith("ray::ServeRep")]
    engines = [pid for pid, command in processes.items() if "jaxserve.engine.process" in command]
    assert (len(replicas), len(engines)) == (2, 2)
    streams = [Stream(cluster.url) for _ in range(NUM_STREAMS)]
    wait_until(lambda: sum(stream.num_events > 5 for stream in streams) >= NUM_STREAMS / 2, 60)
    os.kill(replicas[0], signal.SIGKILL)
    for stream in streams:
        stream.join()
    whole = [stream for stream in streams if stream.is_whole]
    assert 0 < len(whole) < NUM_STREAMS
    # What the survivor says of itself: all that it had went to its end, and these are those.
    num_finished = finished(cluster.url)
    assert num_finished.pop("length") == len(whole)
    assert not any(num_finished.values())
    assert [complete(cluster.url) for _ in range(4)] == [200] * 4

    processes |= descendants(cluster.process.pid)
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.process.wait(60) == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
