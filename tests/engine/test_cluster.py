"""Clusters without devices: who joins, what is agreed, and what the loss of a process does."""

import contextlib
import dataclasses
import json
import queue
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine import cluster, link, startup
from jaxserve.engine.cluster import Place, hint_of, place_of
from jaxserve.engine.follower import Follower
from jaxserve.engine.leader import Leader
from jaxserve.errors import ConfigError, EngineStopped
from jaxserve.server import build_app
from tests.checkpoints import write_llama_folder

FACTS = {"max_num_seqs": "4", "jax version": "1"}
WAIT_S = 30


def place(process_id=0, *, count=2, port=0, **options):
    return Place(host="127.0.0.1", port=port, num_processes=count, process_id=process_id, **options)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Node:
    """One process's end on a thread of this one, with what it said and how it ended."""

    def __init__(self, where, facts=FACTS):
        self.lines = []
        self.end = queue.SimpleQueue()
        make = Follower if where.process_id else Leader
        self.peers = make(where, facts, self.lines.append, self._end)
        self.error = None
        self.thread = threading.Thread(target=self._join, daemon=True)
        self.thread.start()

    def _end(self, reason):
        self.end.put(reason)
        if isinstance(self.peers, Follower):  # as its process does
            self.peers._link.close()

    def _join(self):
        try:
            self.peers.join()
        except Exception as error:
            self.error = error

    def joined(self):
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive(), self.lines
        return self.error

    def wait_for_line(self, pattern):
        wait_until(lambda: any(re.search(pattern, line) for line in self.lines))


def wait_until(condition):
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def joined_nodes(count=2, **options):
    port = free_port()
    nodes = [Node(place(index, count=count, port=port, **options)) for index in range(count)]
    assert [node.joined() for node in nodes] == [None] * count
    return nodes


def test_every_process_gets_what_all_brought_to_an_exchange():
    nodes = joined_nodes(3)
    results = [None] * 3

    def exchange(index):
        results[index] = nodes[index].peers.exchange({"pages": index})

    threads = [threading.Thread(target=exchange, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert results == [[{"pages": 0}, {"pages": 1}, {"pages": 2}]] * 3
    nodes[0].peers.end()


def test_all_know_the_same_address_for_jax():
    nodes = joined_nodes(3)
    addresses = {node.peers.jax_address for node in nodes}
    assert len(addresses) == 1 and re.fullmatch(r"127\.0\.0\.1:\d+", addresses.pop())
    nodes[0].peers.end()


def test_steps_arrive_in_order_with_their_bytes():
    leader, *followers = joined_nodes(3)
    leader.peers.send_step((2, 2), b"one", None, None)
    leader.peers.send_step((64, 2), b"two" * 10**5, b"extras", b"masks")
    for follower in followers:
        first, second = follower.peers.next_step(), follower.peers.next_step()
        assert (first.bucket, first.blob, first.extras) == ((2, 2), b"one", None)
        assert (second.bucket, second.blob, second.extras) == ((64, 2), b"two" * 10**5, b"extras")
        assert (first.masks, second.masks) == (None, b"masks")
    leader.peers.end()


def test_an_end_in_order_reaches_all_and_is_no_loss():
    leader, *followers = joined_nodes(3)
    threading.Thread(target=leader.peers.end).start()
    for follower in followers:
        assert follower.end.get(timeout=WAIT_S) is None
        with pytest.raises(EngineStopped, match="the cluster has ended"):
            follower.peers.next_step()
    time.sleep(0.1)
    assert leader.end.empty()


def test_who_is_missing_is_said_on_both_sides():
    port = free_port()
    leader = Node(place(count=4, port=port))
    leader.wait_for_line("waiting for processes 1, 2, 3 of 4")
    follower = Node(place(2, count=4, port=port))
    leader.wait_for_line(r"process 2 is there \(127.0.0.1\)")
    follower.wait_for_line("process 0 is waiting for processes 1, 3 of 4")
    follower.peers._link.close()
    leader.wait_for_line("process 2 .* has left")
    assert leader.end.empty()


def test_processes_that_do_not_come_in_time_are_named():
    leader = Node(place(count=3, port=free_port(), join_timeout_s=0.3))
    assert "processes 1, 2 of 3 did not come in 0.3 s" in str(leader.joined())


def test_a_follower_says_whom_it_waits_for_and_for_how_long():
    port = free_port()
    follower = Node(place(1, port=port, join_timeout_s=0.5))
    error = follower.joined()
    assert isinstance(error, ConfigError)
    assert f"process 0 at 127.0.0.1:{port} did not answer in" in str(error)
    assert f"waiting for process 0 at 127.0.0.1:{port}" in follower.lines[0]


@pytest.mark.parametrize(
    ("where", "facts", "reason"),
    [
        ({}, {**FACTS, "max_num_seqs": "8"}, "its max_num_seqs is 8; process 0 has 4"),
        ({}, {"max_num_seqs": "4"}, "its jax version is None; process 0 has 1"),
        ({}, {**FACTS, "new": "x"}, "its new is x; process 0 has None"),
        ({"num_processes": 3}, FACTS, "it has num_processes 3; process 0 has 2"),
        ({"process_id": 5}, FACTS, "its process_id is 5; 1 to 1 follow process 0"),
    ],
)
def test_a_process_that_differs_is_refused_with_the_reason_and_may_come_again(where, facts, reason):
    port = free_port()
    leader = Node(place(port=port))
    wrong = Node(dataclasses.replace(place(1, port=port), **where), facts)
    error = wrong.joined()
    assert isinstance(error, ConfigError) and str(error).endswith(reason)
    leader.wait_for_line(f"refused process .*{re.escape(reason)}")
    assert Node(place(1, port=port)).joined() is None
    assert leader.joined() is None
    leader.peers.end()


def test_a_second_process_of_the_same_number_is_refused():
    port = free_port()
    leader = Node(place(count=3, port=port))
    Node(place(1, count=3, port=port))
    leader.wait_for_line("process 1 is there")
    assert "there is a process 1 already" in str(Node(place(1, count=3, port=port)).joined())


@pytest.mark.parametrize("greeting", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x02hi"])
def test_a_stranger_on_the_port_is_ignored(greeting):
    port = free_port()
    leader = Node(place(port=port))
    leader.wait_for_line("waiting")
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(greeting)
        with contextlib.suppress(OSError):  # refused already
            sock.shutdown(socket.SHUT_WR)
    assert Node(place(1, port=port)).joined() is None
    assert leader.joined() is None
    leader.peers.end()


def test_a_port_that_is_taken_is_an_error_that_says_so():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        assert f"coordinator's port {port}" in str(Node(place(port=port)).joined())


def test_a_lost_follower_is_named_to_all():
    leader, first, second = joined_nodes(3)
    first.peers._link.close()
    reason = "process 1 (127.0.0.1) was lost: it closed its connection"
    assert leader.end.get(timeout=WAIT_S) == reason
    assert second.end.get(timeout=WAIT_S) == reason
    with pytest.raises(EngineStopped, match="process 1"):
        leader.peers.exchange("anything")


def test_the_loss_of_process_0_is_named_to_its_followers():
    leader, *followers = joined_nodes(3)
    for connection in leader.peers._known_links():
        connection.close()
    for follower in followers:
        assert "process 0 (127.0.0.1) was lost" in follower.end.get(timeout=WAIT_S)
        with pytest.raises(EngineStopped, match="process 0"):
            follower.peers.next_step()


def test_a_silent_process_is_lost_after_a_while(monkeypatch):
    monkeypatch.setattr(link, "LOST_S", 0.8)
    leader, follower = joined_nodes()
    monkeypatch.setattr(follower.peers._link, "beat", lambda: None)
    assert "process 1 (127.0.0.1) was lost: not heard from" in leader.end.get(timeout=WAIT_S)


def test_processes_that_beat_are_not_lost(monkeypatch):
    monkeypatch.setattr(link, "LOST_S", 2.5)
    leader, follower = joined_nodes()
    time.sleep(4)
    assert leader.end.empty() and follower.end.empty()
    leader.peers.end()


def test_a_follower_that_fails_ends_all_with_its_reason():
    leader, first, second = joined_nodes(3)
    error = OSError("the disk is gone")
    first.peers._fate._known.set()  # no loss will explain it
    assert first.peers.explain(error) is error
    reason = "process 1 (127.0.0.1) failed: OSError: the disk is gone"
    assert leader.end.get(timeout=WAIT_S) == reason
    assert second.end.get(timeout=WAIT_S) == reason


def test_an_error_that_a_loss_caused_becomes_the_loss():
    leader, follower = joined_nodes()
    follower.peers._link.close()
    explained = leader.peers.explain(RuntimeError("connection reset by peer"))
    assert isinstance(explained, EngineStopped)
    assert "process 1 (127.0.0.1) was lost" in str(explained)


def test_a_step_that_hangs_is_a_loss():
    leader, follower = joined_nodes(step_timeout_s=0.6)
    with leader.peers.step_in_time():
        reason = leader.end.get(timeout=WAIT_S)
    assert reason == "a step has not finished in 0.6 s (step_timeout)"
    assert follower.end.get(timeout=WAIT_S) == reason


def test_steps_in_time_are_no_loss():
    leader, follower = joined_nodes(step_timeout_s=0.8)
    for _ in range(8):
        with leader.peers.step_in_time():
            time.sleep(0.2)
    assert leader.end.empty() and follower.end.empty()
    leader.peers.end()


def options(**values):
    return ServerConfig(**values)


def test_a_place_is_what_the_options_say():
    config = options(
        coordinator="[::1]:90", num_processes=3, process_id=2, join_timeout=7.0, step_timeout=8.0
    )
    where = place_of(config, {})
    assert where == Place(
        host="::1",
        port=90,
        num_processes=3,
        process_id=2,
        join_timeout_s=7.0,
        step_timeout_s=8.0,
    )
    assert Place.from_text(where.to_text()) == where


def test_one_process_has_no_place():
    assert place_of(options(), {}) is None
    assert place_of(options(num_processes=1), {"SLURM_NTASKS": "4"}) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "a:1"}, "coordinator alone .* give num_processes and process_id, too"),
        ({"coordinator": "a:1", "num_processes": 2}, "give process_id, too"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "coordinator is 'a'; .*HOST:"),
        ({"coordinator": "a:0", "num_processes": 2, "process_id": 0}, "it must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id is 2; with num"),
    ],
)
def test_options_that_name_no_place_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        place_of(options(**values), {})


@pytest.mark.parametrize(
    ("environ", "hint"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE"),
        ({"KUBERNETES_SERVICE_HOST": "x"}, None),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES"),
    ],
)
def test_jax_is_asked_only_where_there_may_be_a_cluster(environ, hint):
    assert hint_of(environ) == hint


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "3",
}


def test_slurm_says_the_place(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    where = place_of(options(), SLURM)
    assert (where.host, where.num_processes, where.process_id) == ("node001", 2, 1)
    assert where.local_device_ids == (3,)
    assert place_of(options(coordinator="other:5"), SLURM).host == "other"


def test_a_detection_that_fails_leaves_one_process_and_a_warning(monkeypatch, caplog):
    def fail(command, **keywords):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no job\n")

    monkeypatch.setattr(cluster.subprocess, "run", fail)
    assert place_of(options(), {"SLURM_NTASKS": "2"}) is None
    assert "no cluster detected (RuntimeError: no job)" in caplog.text
    with pytest.raises(ConfigError, match="cannot be detected: RuntimeError: no job"):
        place_of(options(num_processes=2), {"SLURM_NTASKS": "2"})


def test_the_detection_prints_nothing_where_there_is_no_cluster():
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve.engine.detect"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {}


def test_an_application_under_another_host_takes_no_place():
    config = options(coordinator="a:1", num_processes=2, process_id=0)
    with pytest.raises(ConfigError, match="coordinator, num_processes, process_id: only `jaxserve"):
        build_app(EngineConfig(), config)
    build_app(EngineConfig(), options(coordinator="a:1", num_processes=1))


def test_an_engine_of_its_own_refuses_to_be_one_of_several_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(startup.jax, "process_count", lambda: 2)
    config = EngineConfig(model=str(write_llama_folder(tmp_path)), compile_cache_dir="")
    with pytest.raises(ConfigError, match="jax.distributed runs 2 processes here"):
        startup.start(config, print)
