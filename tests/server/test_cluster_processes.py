"""Several processes on this machine run one model: the same tokens, and one end for all."""

import concurrent.futures
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import httpx2
import pytest

from tests.checkpoints import write_llama_folder
from tests.server.processes import children_of, free_port, running

pytestmark = pytest.mark.slow

END_S = 30  # in which the end of one process must have ended all, on a machine under load
START_S = 240
OPTIONS = (
    "--dtype=float32 --max-num-seqs=2 --max-num-batched-tokens=64 --max-model-len=96 "
    "--page-size=4 --num-pages=60 --port=0"
).split()
REQUESTS = (
    {"temperature": 0},
    {"temperature": 0, "frequency_penalty": 0.7, "repetition_penalty": 1.3},
    {"temperature": 1, "seed": 1, "top_p": 0.9},
    {"temperature": 1, "seed": 2, "top_k": 40, "logit_bias": {"7": 4.0, "300": 3.0}},
    {"temperature": 1, "seed": 3, "allowed_token_ids": [5, 120, 130, 255, 319]},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 1, "seed": 4, "structured_outputs": {"regex": "[a-f]+[0-9]{3,90}"}},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    return write_llama_folder(path, seed=1, heads=8, kv_heads=4, head_dim=8, tied=False)


def command(folder, *options):
    # All of one test's runs share the executables: only the first of a mesh compiles.
    cache = f"--compile-cache-dir={folder / 'cache'}"
    return [sys.executable, "-m", "jaxserve", "serve", str(folder), *OPTIONS, cache, *options]


def env(num_devices):
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}


@contextlib.contextmanager
def processes(folder, count, mesh, *options):
    """Starts the processes of a cluster; yields them when process 0 takes requests."""
    with contextlib.ExitStack() as stack:
        place = [f"--coordinator=127.0.0.1:{free_port()}", f"--num-processes={count}"]
        started = [
            stack.enter_context(
                running(
                    command(folder, f"--mesh={mesh}", *place, f"--process-id={index}", *options),
                    env=env(8 // count),
                )
            )
            for index in range(count)
        ]
        started[0].wait_ready(START_S)
        yield started


def answers_of(server):
    """Returns each request's tokens, and its log-probabilities where asked for, run together."""

    def answer(index):
        prompt = [5 + index, 6, 7, *range(20, 20 + 5 * index)]
        body = {"prompt": prompt, "max_tokens": 24, "ignore_eos": True, "return_token_ids": True}
        response = httpx2.post(
            f"{server.url}/v1/completions", json={**body, **REQUESTS[index]}, timeout=120
        )
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        return choice["token_ids"], (choice["logprobs"] or {}).get("token_logprobs")

    with concurrent.futures.ThreadPoolExecutor(len(REQUESTS)) as pool:
        return list(pool.map(answer, range(len(REQUESTS))))


@pytest.fixture(scope="module")
def expected(folder):
    with running(command(folder), env=env(1)) as server:
        server.wait_ready(START_S)
        return answers_of(server)


def assert_same(answers, expected):
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(answers, expected, strict=True):
        assert tokens == other_tokens
        assert logprobs == (
            None if other_logprobs is None else pytest.approx(other_logprobs, abs=1e-4)
        )


def engine_pid(server):
    (pid,) = children_of(server.process.pid)
    return pid


def is_running(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def assert_all_end(servers, pids, start_s):
    """Checks that every process, engines included, is gone in time; returns the exit statuses."""
    deadline_s = start_s + END_S
    statuses = [server.process.wait(max(0.1, deadline_s - time.monotonic())) for server in servers]
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline_s, [pid for pid in pids if is_running(pid)]
        time.sleep(0.02)
    return statuses


@contextlib.contextmanager
def lost(servers, pid, number=signal.SIGKILL):
    """Ends a process in the middle of a stream and checks what becomes of all."""
    pids = [pid for server in servers for pid in (server.process.pid, engine_pid(server))]
    body = {"prompt": [5], "max_tokens": 90, "ignore_eos": True, "stream": True}
    url, texts = f"{servers[0].url}/v1/completions", []
    with (
        contextlib.suppress(httpx2.RemoteProtocolError, httpx2.ReadError),  # process 0 was killed
        httpx2.stream("POST", url, json=body, timeout=60) as response,
    ):
        for text in response.iter_text():
            if not texts:
                start_s = time.monotonic()
                os.kill(pid, number)
            texts.append(text)
    assert "[DONE]" not in "".join(texts)
    yield "".join(texts)
    statuses = assert_all_end(servers, pids, start_s)
    assert 0 not in statuses, statuses


def log_of(server):
    return "".join(server.log)


def test_two_processes_give_the_tokens_of_one_and_end_in_order(folder, expected):
    with processes(folder, 2, "2x4") as servers:
        assert_same(answers_of(servers[0]), expected)
        assert_same(answers_of(servers[0]), expected)
        with httpx2.Client(base_url=servers[1].url) as follower:
            assert follower.get("/health").status_code == 200
            assert follower.get("/ready").status_code == 404
            assert follower.post("/v1/completions", json={}).status_code == 404
        pids = [pid for server in servers for pid in (server.process.pid, engine_pid(server))]
        # As Kubernetes does: all are told at once, while a request runs.
        with httpx2.stream(
            "POST",
            f"{servers[0].url}/v1/completions",
            json={"prompt": [5], "max_tokens": 60, "ignore_eos": True, "stream": True},
            timeout=60,
        ) as response:
            chunks = response.iter_text()
            text = next(chunks)
            for server in reversed(servers):
                server.process.send_signal(signal.SIGTERM)
            text += "".join(chunks)
        assert text.endswith("data: [DONE]\n\n")
        assert assert_all_end(servers, pids, time.monotonic()) == [0, 0]
        assert "goes on until process 0 ends" in log_of(servers[1])


def test_a_killed_follower_ends_all_and_the_stream_says_who_was_lost(folder, expected):
    with processes(folder, 2, "1x8") as servers:
        assert_same(answers_of(servers[0]), expected)
        with lost(servers, servers[1].process.pid) as text:
            assert "process 1 (127.0.0.1) was lost" in text
        assert "process 1 (127.0.0.1) was lost" in log_of(servers[0])


def test_four_processes_give_the_tokens_of_one_and_end_with_process_0(folder, expected):
    with processes(folder, 4, "2x4") as servers:
        assert_same(answers_of(servers[0]), expected)
        with lost(servers, servers[0].process.pid):
            pass
        for server in servers[1:]:
            assert " ERROR " in log_of(server)


def test_an_engine_that_stands_still_ends_all(folder):
    with processes(folder, 2, "2x4") as servers:
        pid = engine_pid(servers[1])
        with lost(servers, pid, signal.SIGSTOP) as text:
            assert "process 1 (127.0.0.1) was lost: not heard from for 5 s" in text
        assert "has not answered for 5 s" in log_of(servers[1])


def test_a_follower_with_another_option_is_refused_and_a_missing_one_is_named(folder):
    place = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2", "--mesh=2x4"]
    with (
        running(command(folder, *place, "--process-id=0"), env=env(4)) as first,
        running(command(folder, *place, "--process-id=1", "--max-num-seqs=3"), env=env(4)) as other,
    ):
        first.wait_for_line("(waiting for process 1 of 2)", 60)
        assert other.process.wait(60) == 1
        assert "its max_num_seqs is not that of process 0" in log_of(other)
        first.wait_for_line("(refused process 1 .*its max_num_seqs is '3'; process 0 has '2')", 10)
        assert httpx2.get(f"{first.url}/ready").status_code == 503
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(END_S) == 0


def test_a_signal_while_processes_are_missing_ends_in_order_those_that_came(folder):
    place = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=3", "--mesh=2x4"]
    with (
        running(command(folder, *place, "--process-id=0"), env=env(4)) as first,
        running(command(folder, *place, "--process-id=1"), env=env(4)) as other,
    ):
        first.wait_for_line("(process 1 is there)", 60)
        other.wait_for_line("(process 0 is waiting for process 2 of 3)", 60)
        first.process.send_signal(signal.SIGTERM)
        assert [first.process.wait(END_S), other.process.wait(END_S)] == [0, 0]


def test_a_mesh_that_leaves_a_process_out_ends_all_with_the_reason(folder):
    place = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2", "--mesh=1x4"]
    with (
        running(command(folder, *place, "--process-id=0"), env=env(4)) as first,
        running(command(folder, *place, "--process-id=1"), env=env(4)) as other,
    ):
        assert [first.process.wait(90), other.process.wait(END_S)] == [1, 1]
        for server in (first, other):
            assert "mesh 1x4 takes the devices of 1 of 2 processes" in log_of(server)
