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
            assert samples[prefix + name, None].labels["engine"] == "0"
        assert samples[prefix + "request_success_total", "length"].value == 3
        assert samples[prefix + "inter_token_latency_seconds_bucket", "+Inf"].value <= 9
    assert samples["jaxserve:kv_pages_free", None].value == 100
    facts = samples["jaxserve:engine_info", None].labels
    assert (facts["mesh"], facts["num_processes"]) == ("1x1", "1")
    assert (facts["attention"], facts["experts"]) == ("none", "none")
    assert samples["jaxserve:compiles_since_ready_total", None].value == 0
    assert samples["jaxserve:host_gap_seconds_total", None].value == 0


# What vLLM's own test of its /metrics requires.
REQUIRED = (
    "num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc "
    "prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total "
    "admission_rejections_total prompt_tokens_total generation_tokens_total "
    "iteration_tokens_total_sum iteration_tokens_total_bucket iteration_tokens_total_count "
    "cache_config_info request_success_total"
).split() + [
    f"{name}_{part}"
    for name in (
        "request_prompt_tokens request_generation_tokens request_params_n "
        "request_params_max_tokens time_to_first_token_seconds inter_token_latency_seconds "
        "e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds "
        "request_prefill_time_seconds request_decode_time_seconds request_num_preemptions"
    ).split()
    for part in ("sum", "bucket", "count")
]


def scraped(http: httpx2.Client) -> dict[str, list]:
    """Returns the samples of a scrape by name."""
    samples: dict[str, list] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def test_every_metric_that_vllm_requires_is_there(http):
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 4, "n": 2})
    samples = scraped(http)
    for prefix in ("vllm:", "jaxserve:"):
        assert [name for name in REQUIRED if prefix + name not in samples] == []
        for name in REQUIRED:
            assert {"model_name", "engine"} <= samples[prefix + name][0].labels.keys()


def test_times_of_a_sample_add_up(server, http):
    server.link.engine._step_s = 0.02
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 6})
    samples = scraped(http)

    def total(name: str) -> float:
        assert samples[f"vllm:{name}_count"][0].value == 1, name
        return samples[f"vllm:{name}_sum"][0].value

    decode_s, inference_s = (
        total("request_decode_time_seconds"),
        total("request_inference_time_seconds"),
    )
    assert 0.1 <= decode_s <= inference_s <= total("e2e_request_latency_seconds")
    queue_s, prefill_s = total("request_queue_time_seconds"), total("request_prefill_time_seconds")
    assert queue_s + prefill_s == pytest.approx(total("time_to_first_token_seconds"), abs=0.01)
    assert total("request_time_per_output_token_seconds") == pytest.approx(decode_s / 5)
    assert total("request_params_max_tokens") == total("request_generation_tokens") == 6
    assert total("request_max_num_generation_tokens") == 6
    assert total("request_num_preemptions") == 0


def test_the_cache_is_described_in_labels(http):
    (info,) = scraped(http)["vllm:cache_config_info"]
    assert info.labels == {
        "model_name": "echo", "engine": "0", "block_size": "16", "num_gpu_blocks": "100",
        "cache_dtype": "float32", "enable_prefix_caching": "True",
        "kv_cache_size_tokens": "1600", "kv_cache_max_concurrency": "12.50",
    }  # fmt: skip


def test_refusals_of_a_full_queue_and_http_requests_are_counted():
    with EchoServer(max_waiting=1) as server, httpx2.Client(base_url=server.url) as http:
        http.post("/v1/completions", json={"prompt": ["a", "b"]})
        http.get("/v1/models/gpt")
        http.get("/made/up")
        samples = scraped(http)
    (rejected,) = samples["vllm:admission_rejections_total"]
    assert (rejected.labels["reason"], rejected.value) == ("max_num_queued_reqs", 1)
    counts = {tuple(s.labels.values()): s.value for s in samples["http_requests_total"]}
    assert counts == {
        ("/v1/completions", "POST", "4xx"): 1,
        ("/v1/models/{model:path}", "GET", "4xx"): 1,
        ("none", "GET", "4xx"): 1,
    }
    assert len(samples["http_request_duration_seconds_count"]) == 3


def test_what_the_engine_cannot_finish_is_counted_as_error():
    with EchoServer(fails_at=122) as server, httpx2.Client(base_url=server.url) as http:
        assert http.post("/v1/completions", json={"prompt": "az"}).status_code == 500
        counts = {
            sample.labels["finished_reason"]: sample.value
            for sample in scraped(http)["vllm:request_success_total"]
        }
    assert counts["error"] == 1


def test_the_end_by_a_stop_string_is_counted_as_stop(http):
    http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 100, "stop": "lo"})
    lines = http.get("/metrics").text.splitlines()
    counts = {
        line.split('finished_reason="')[1].split('"')[0]: float(line.split()[-1])
        for line in lines
        if line.startswith("jaxserve:request_success_total{")
    }
    assert counts == {"abort": 0, "error": 0, "length": 0, "repetition": 0, "stop": 1}


def test_a_client_that_leaves_is_counted_as_abort(server, http):
    server.link.engine._step_s = 0.01
    body = {"prompt": "hello", "max_tokens": 100, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_text())
    deadline_s = time.monotonic() + 5
    wanted = (
        'jaxserve:request_success_total{engine="0",finished_reason="abort",model_name="echo"} 1.0'
    )
    while wanted not in http.get("/metrics").text:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_front_does_not_import_jax():
    code = "import sys, jaxserve.server.main, jaxserve.server.app; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
