"""Both ends of a cluster without devices: who joins, what is agreed, what a loss does."""

import contextlib
import dataclasses
import functools
import queue
import re
import socket
import threading
import time

import pytest

from jaxserve.engine import follower as following, leader as leading, link
from jaxserve.engine.cluster import Place
from jaxserve.engine.follower import Follower
from jaxserve.engine.leader import Leader
from jaxserve.errors import ConfigError, EngineStopped
from tests.server.processes import free_port
from tests.waiting import WAIT_S, wait_until

FACTS = {"max_num_seqs": "4", "jax version": "1"}


def place(process_id=0, *, count=2, port=0, **options):
    return Place(host="127.0.0.1", port=port, num_processes=count, process_id=process_id, **options)


class Node:
    """One process's end on a thread of this one, with what it said and how it ended."""

    def __init__(self, where, facts=FACTS):
        self.lines = []
        self.end = queue.SimpleQueue()
        self.heard = threading.Event()
        make = Leader
        if where.process_id:
            make = functools.partial(Follower, on_heard=self.heard.set)
        self.peers = make(where, facts, self.lines.append, self._end)
        self.error = None
        self.thread = threading.Thread(target=self._join, daemon=True)
        self.thread.start()

    def _end(self, reason):
        self.end.put(reason)
        if isinstance(self.peers, Follower) and self.peers._link:  # as its process does
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
        ({}, {**FACTS, "max_num_seqs": "8"}, "its max_num_seqs is '8'; process 0 has '4'"),
        ({}, {"max_num_seqs": "4"}, "its jax version is missing; process 0 has '1'"),
        ({}, {**FACTS, "jax version": "\n" * 300}, r"its jax version is '(\\n){200}...'; process"),
        ({"num_processes": 3}, FACTS, "it has num_processes 3; process 0 has 2"),
        ({"process_id": 5}, FACTS, "its process_id is 5; 1 to 1 follow process 0"),
    ],
)
def test_a_process_that_differs_is_refused_with_the_reason_and_may_come_again(where, facts, reason):
    port = free_port()
    leader = Node(place(port=port))
    wrong = Node(dataclasses.replace(place(1, port=port), **where), facts)
    error = wrong.joined()
    assert isinstance(error, ConfigError)
    leader.wait_for_line(f"refused process .*{reason}")
    # Whoever asks may be a stranger: what process 0 has is for its own log.
    is_told_why = reason in str(error) if where else "whose log has both" in str(error)
    assert is_told_why and "'4'" not in str(error)
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


def test_strangers_that_say_nothing_keep_nobody_waiting(monkeypatch):
    monkeypatch.setattr(leading, "GREETING_S", 2.0 * WAIT_S)
    port = free_port()
    leader = Node(place(port=port))
    leader.wait_for_line("waiting")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert Node(place(1, port=port)).joined() is None
        assert leader.joined() is None
    leader.peers.end()


def test_a_greeting_ends_in_time_however_slowly_it_comes(monkeypatch):
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(leading, "GREETING_S", 0.3)
    leader = Leader(place(), FACTS, print, print)
    greeting = threading.Thread(target=leader._greet, args=(theirs, "stranger"), daemon=True)
    greeting.start()
    with ours, contextlib.suppress(OSError):  # closed, as it is to be
        ours.sendall(link.LENGTH.pack(1000))
        for _ in range(200):
            ours.sendall(b"\0")
            time.sleep(0.02)
    assert not greeting.is_alive()
    leader.end()


def test_a_process_0_that_is_slow_to_greet_is_not_lost(monkeypatch):
    monkeypatch.setattr(link, "LOST_S", 1.5)
    greet = Leader._greet
    monkeypatch.setattr(Leader, "_greet", lambda *args: (time.sleep(2.5), greet(*args))[1])
    port = free_port()
    nodes = [Node(place(index, port=port)) for index in range(2)]
    assert [node.joined() for node in nodes] == [None, None]
    nodes[0].peers.end()


def test_a_greeting_comes_before_any_beat(monkeypatch):
    monkeypatch.setattr(link, "BEAT_S", 0.01)
    receive = leading.receive_frame
    frames = []

    def keep(*args):
        frames.append(receive(*args))
        return frames[-1]

    monkeypatch.setattr(leading, "receive_frame", keep)
    send = following.send_frame
    monkeypatch.setattr(following, "send_frame", lambda *args: (time.sleep(0.3), send(*args)))
    nodes = joined_nodes()
    assert [type(frame) for frame in frames] == [link.Hello]
    nodes[0].peers.end()


def test_a_follower_that_hears_nothing_waits_no_longer_than_it_may():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        follower = Node(place(1, port=port, join_timeout_s=0.3))
        assert "said nothing in 0.3 s" in str(follower.joined())


def test_a_follower_says_when_process_0_was_heard():
    port = free_port()
    follower = Node(place(1, count=3, port=port))
    follower.wait_for_line("waiting for process 0")
    assert not follower.heard.is_set()
    leader = Node(place(count=3, port=port))
    assert follower.heard.wait(WAIT_S)
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
    leader.peers._fate.claim(None)  # it is gone, and tells nobody
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


def test_each_step_has_the_time_anew(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(leading.time, "monotonic", lambda: now_s)
    leader = Leader(place(step_timeout_s=8.0), FACTS, print, print)
    leader._watch.stop()
    for _ in range(3):
        with leader.step_in_time():
            now_s += 7.0
            assert leader._check_step() is None
    now_s += 100.0
    assert leader._check_step() is None
    with leader.step_in_time():
        now_s += 9.0
        assert leader._check_step() == "a step has not finished in 8 s (step_timeout)"
