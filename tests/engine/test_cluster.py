"""Which process of a cluster this is: by options, by detection, and where it is alone."""

import json
import subprocess
import sys

import pytest

from jaxserve.asgi import hosted_configs
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine import cluster, startup
from jaxserve.engine.cluster import Place, hint_of, place_of
from jaxserve.errors import ConfigError
from jaxserve.server import build_app
from tests.checkpoints import write_llama_folder

ENGINE = EngineConfig()


def options(**values):
    return ServerConfig(**values)


@pytest.fixture
def no_devices(monkeypatch):
    """As on a machine without a TPU, wherever the test runs."""
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: [])


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


def test_one_process_has_no_place(no_devices):
    assert place_of(options(), {}) is None
    assert place_of(options(num_processes=1), {"SLURM_NTASKS": "4"}) is None
    assert place_of(options(num_processes=1, process_id=0), {}) is None


@pytest.mark.parametrize(
    "values",
    [
        {"num_processes": 1, "coordinator": "a:1"},
        {"num_processes": 1, "process_id": 3},
        {"health_port": 9},
        {"join_timeout": 9.0},
        {"num_processes": 1, "step_timeout": 9.0},
    ],
)
def test_one_process_alone_refuses_what_it_has_no_use_for(values, no_devices):
    *_, name = values
    for refuse in (lambda config: place_of(config, {}), lambda config: build_app(ENGINE, config)):
        with pytest.raises(ConfigError, match=f"{name} is .* this is one process alone"):
            refuse(options(**values))


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
def test_jax_is_asked_only_where_there_may_be_a_cluster(environ, hint, no_devices):
    assert hint_of(environ) == hint


def test_jax_is_asked_where_there_is_a_tpu(monkeypatch):
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert hint_of({}) == "libtpu"
    assert hint_of({"TPU_SKIP_MDS_QUERY": "1"}) is None


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


def detect(monkeypatch, status, out, log):
    """Lets the process that is asked answer this."""
    done = subprocess.CompletedProcess([], status, out, log)
    monkeypatch.setattr(cluster.subprocess, "run", lambda command, **keywords: done)


@pytest.mark.parametrize(
    ("environ", "ids"),
    [
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2"}, ()),
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "2"}, (3,)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ()),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (3,)),
    ],
)
def test_a_process_that_has_its_host_alone_takes_all_of_its_devices(monkeypatch, environ, ids):
    found = {"coordinator": "a:1", "num_processes": 2, "process_id": 1, "local_device_ids": [3]}
    detect(monkeypatch, 0, json.dumps(found), "")
    assert place_of(options(), environ).local_device_ids == ids


def test_a_detection_that_fails_is_an_error_where_there_must_be_a_cluster(monkeypatch, caplog):
    detect(monkeypatch, 1, "", "Traceback\nRuntimeError: no job\n")
    for values in ({}, {"num_processes": 2}):
        with pytest.raises(ConfigError, match="SLURM_NTASKS=2, but .* RuntimeError: no job; give"):
            place_of(options(**values), {"SLURM_NTASKS": "2"})
    monkeypatch.setattr(cluster, "hint_of", lambda environ: "libtpu")
    assert place_of(options(), {}) is None  # a TPU of one host
    assert "no cluster detected (RuntimeError: no job)" in caplog.text


def test_a_detection_that_finds_nothing_says_why_this_process_runs_alone(monkeypatch, caplog):
    detect(monkeypatch, 0, "{}", "UserWarning: the `kubernetes` package\n is not installed\n")
    environ = {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}
    assert place_of(options(), environ) is None
    assert "JOB_COMPLETION_INDEX=0, but jax detects no cluster" in caplog.text
    assert "the `kubernetes` package is not installed" in caplog.text
    with pytest.raises(ConfigError, match="give coordinator and process_id, too"):
        place_of(options(num_processes=2), environ)


def test_the_detection_prints_nothing_where_there_is_no_cluster():
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve.engine.detect"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {}


def test_an_application_under_another_host_takes_no_place():
    config = options(coordinator="a:1", num_processes=2, process_id=0)
    for refuse in (build_app, lambda engine, server: hosted_configs(["--process-id", "0"])):
        with pytest.raises(ConfigError, match="only several that `jaxserve serve` runs together"):
            refuse(ENGINE, config)
    build_app(ENGINE, options(num_processes=1))


def test_an_engine_of_its_own_refuses_to_be_one_of_several_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(startup.jax, "process_count", lambda: 2)
    config = EngineConfig(model=str(write_llama_folder(tmp_path)), compile_cache_dir="")
    with pytest.raises(ConfigError, match="jax.distributed runs 2 processes here"):
        startup.start(config, print)
