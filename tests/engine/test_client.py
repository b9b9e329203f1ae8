"""The engine on a thread: admission, aborts, and what callers learn when it dies."""

import queue
import threading

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.client import EngineThread
from jaxserve.engine.cluster import Place
from jaxserve.engine.core import EngineCore
from jaxserve.engine.leader import Leader
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.errors import ConfigError, EngineStopped, QueueFull
from tests.checkpoints import write_llama_folder

ENDLESS = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = write_llama_folder(tmp_path_factory.mktemp("llama"))
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_model_len=128,
        max_num_queued_reqs=3,
        compile_cache_dir=str(tmp_path_factory.mktemp("cache")),
    )


def request(name, params=ENDLESS):
    return Request(request_id=name, prompt_tokens=(3, 4, 5), params=params)


def test_free_slots_and_queue_take_requests_and_no_more(config, monkeypatch):
    go = threading.Event()
    step = EngineCore.step
    monkeypatch.setattr(EngineCore, "step", lambda core: (go.wait(), step(core))[1])
    updates = queue.SimpleQueue()
    engine = EngineThread(config, updates.put)
    for index in range(5):
        engine.submit(request(str(index)))
    with pytest.raises(QueueFull, match="3"):
        engine.submit(request("one too many"))
    go.set()
    finished = set()
    while len(finished) < 5:
        for update in updates.get(timeout=30):
            assert update.error is None
            if update.finish_reason == "length":
                finished.add(update.request_id)
    engine.submit(request("room again"))
    engine.close()
    with pytest.raises(EngineStopped):
        engine.submit(request("late"))


def test_an_aborted_request_says_so_and_frees_its_pages(config):
    updates = queue.SimpleQueue()
    engine = EngineThread(config, updates.put)
    engine.submit(request("a"))
    updates.get(timeout=30)
    engine.abort(["a", "unknown"])
    while True:
        last = updates.get(timeout=30)[-1]
        if last.finish_reason is not None:
            break
    assert (last.request_id, last.finish_reason) == ("a", "abort")
    engine.close()
    engine.close()
    assert engine.stats().num_pages_free == engine.info.num_pages


def test_when_the_engine_dies_every_request_is_told(config, monkeypatch):
    def fail(core):
        raise RuntimeError("device lost")

    updates = queue.SimpleQueue()
    engine = EngineThread(config, updates.put)
    monkeypatch.setattr(EngineCore, "step", fail)
    engine.submit(request("a"))
    (update,) = updates.get(timeout=30)
    assert update.request_id == "a" and "device lost" in update.error
    with pytest.raises(EngineStopped) as caught:
        engine.submit(request("b"))
    assert isinstance(caught.value.__cause__, RuntimeError)
    engine.close()


def test_when_the_engine_dies_with_nobody_waiting_its_owner_is_told(config, monkeypatch):
    def fail(core):
        raise RuntimeError("device lost")

    updates = queue.SimpleQueue()
    engine = EngineThread(config, updates.put)
    monkeypatch.setattr(EngineCore, "stats", fail)
    engine.abort(["nobody"])
    assert updates.get(timeout=30) == []
    assert isinstance(engine.error, RuntimeError)
    monkeypatch.undo()
    engine.close()


def test_an_engine_that_dies_outside_a_step_is_no_end_in_order_for_its_cluster(config, monkeypatch):
    def fail(core, request_ids):
        raise OSError("the disk is full")

    place = Place(host="127.0.0.1", port=0, num_processes=1, process_id=0)  # none follows it
    leaders = [Leader(place, {}, print, lambda reason: None) for _ in range(2)]
    EngineThread(config, lambda updates: None, leader=leaders[0]).close()
    monkeypatch.setattr(EngineCore, "abort", fail)
    updates = queue.SimpleQueue()
    engine = EngineThread(config, updates.put, leader=leaders[1])
    engine.abort(["anybody"])
    assert updates.get(timeout=30) == []
    engine.close()
    ends = [(leader._fate.is_settled, leader._fate.reason) for leader in leaders]
    assert ends == [(True, None), (True, "process 0 failed: OSError: the disk is full")]


def test_what_loading_raises_is_raised_to_the_caller(config):
    with pytest.raises(ConfigError, match="model"):
        EngineThread(EngineConfig(model="/no/such/model"), lambda updates: None)
