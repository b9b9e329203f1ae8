"""Probes in every phase, and the metrics that routers and dashboards look for."""

import subprocess
import sys
import time

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.serving import EchoServer


@pytest.fixture
def server():
    with EchoServer() as server:
        yield server


@pytest.fixture
def http(server):
    with httpx2.Client(base_url=server.url) as client:
        yield client


def test_a_ready_server_answers_its_probes(http):
    for path in ("/health", "/ready", "/ping"):
        response = http.get(path)
        assert (response.status_code, response.content) == (200, b"")
    assert http.post("/ping").status_code == 200
    assert "version" in http.get("/version").json()


def test_a_loading_server_lives_but_is_not_ready(server, http):
    server.state.text = None
    assert http.get("/health").status_code == 200
    for response in (http.get("/ready"), http.post("/v1/completions", json={"prompt": "a"})):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["message"] == "the model is loading"
    assert http.get("/metrics").status_code == 200


def test_a_draining_server_takes_nothing_new(server, http):
    server.state.is_draining = True
    assert http.get("/health").status_code == 200
    response = http.post("/v1/completions", json={"prompt": "a"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


def test_a_dead_engine_turns_health_to_503(server, http):
    server.state.engine.error = "the device is gone"
    for path in ("/health", "/ready", "/ping"):
        response = http.get(path)
        assert response.status_code == 503
        assert "the device is gone" in response.json()["error"]["message"]


def test_metrics_count_what_was_served_under_both_names(http):
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4})
    http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 4, "n": 2, "stream": True})
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = {
        (sample.name, sample.labels.get("finished_reason") or sample.labels.get("le")): sample
        for family in families
        for sample in family.samples
    }
    for prefix in ("jaxserve:", "vllm:"):
        values = {
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
            "generation_tokens_total": 12,
            "prompt_tokens_total": 9,
            "prefix_cache_queries_total": 0,
            "prefix_cache_hits_total": 0,
            "num_preemptions_total": 0,
            "time_to_first_token_seconds_count": 3,
            "e2e_request_latency_seconds_count": 3,
            "request_queue_time_seconds_count": 3,
            "cache_config_info": 1,
        }
        for name, value in values.items():
            assert samples[prefix + name, None].value == value, name
            assert samples[prefix + name, None].labels["model_name"] == "echo"
        assert samples[prefix + "request_success_total", "length"].value == 3
        assert samples[prefix + "inter_token_latency_seconds_bucket", "+Inf"].value <= 9
    assert samples["jaxserve:kv_pages_free", None].value == 100
    facts = samples["jaxserve:engine_info", None].labels
    assert (facts["mesh"], facts["num_processes"]) == ("1x1", "1")
    assert samples["jaxserve:compiles_since_ready_total", None].value == 0
    assert samples["jaxserve:host_gap_seconds_total", None].value == 0


def test_the_end_by_a_stop_string_is_counted_as_stop(http):
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 100, "stop": "lo"})
    lines = http.get("/metrics").text.splitlines()
    counts = {
        line.split('finished_reason="')[1].split('"')[0]: float(line.split()[-1])
        for line in lines
        if line.startswith("jaxserve:request_success_total{")
    }
    assert counts == {"abort": 0, "length": 0, "stop": 1}


def test_a_client_that_leaves_is_counted_as_abort(server, http):
    server.link.engine._step_s = 0.01
    body = {"prompt": "hello", "max_tokens": 100, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_text())
    deadline_s = time.monotonic() + 5
    wanted = 'jaxserve:request_success_total{finished_reason="abort",model_name="echo"} 1.0'
    while wanted not in http.get("/metrics").text:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_front_does_not_import_jax():
    code = "import sys, jaxserve.server.main, jaxserve.server.app; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
