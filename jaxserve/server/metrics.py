"""/metrics: the engine's counters and the front's timings, under our names and vLLM's.

Dashboards, autoscalers and routers look for vLLM's names, so each value is exported under both
prefixes. The event loop's thread owns the histograms: an observation is a bisection, no lock.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from jaxserve.engine.info import EngineInfo, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKEN_COUNT_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
SAMPLE_COUNT_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 128.0)


class Histogram:
    """Observations counted by bucket."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = help
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Counts `value`, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, prefix: str, model_name: str) -> Metric:
        """Returns the histogram as Prometheus reads it, buckets cumulative."""
        buckets, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        family = HistogramMetricFamily(prefix + self.name, self.help, labels=["model_name"])
        family.add_metric([model_name], buckets, self._sum)
        return family


class ServerMetrics:
    """The front's timings."""

    def __init__(self) -> None:
        self.ttft = Histogram(
            "time_to_first_token_seconds", "From arrival to the first token", TTFT_BUCKETS_S
        )
        self.itl = Histogram(
            "inter_token_latency_seconds", "Between tokens of a sample", TOKEN_BUCKETS_S
        )
        self.e2e = Histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", REQUEST_BUCKETS_S
        )
        self.prompt_tokens = Histogram(
            "request_prompt_tokens", "Prompt tokens of a request", TOKEN_COUNT_BUCKETS
        )
        self.generation_tokens = Histogram(
            "request_generation_tokens", "Tokens generated for a sample", TOKEN_COUNT_BUCKETS
        )
        self.params_n = Histogram("request_params_n", "n asked for", SAMPLE_COUNT_BUCKETS)
        # As clients see it: to the engine, a stop string's end is an abort.
        self.num_finished: Counter[str] = Counter()

    def histograms(self) -> Iterator[Histogram]:
        """Returns every histogram."""
        yield from (self.ttft, self.itl, self.e2e)
        yield from (self.prompt_tokens, self.generation_tokens, self.params_n)


class SampleClock:
    """Times one sample's tokens into the histograms."""

    def __init__(self, metrics: ServerMetrics, arrival_s: float) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._last_s: float | None = None
        self._num_tokens = 0

    def tick(self, num_tokens: int, *, is_last: bool) -> None:
        """Notes tokens that have come just now."""
        now_s = time.monotonic()
        if num_tokens and self._last_s is None:
            self._metrics.ttft.observe(now_s - self._arrival_s)
            self._last_s = now_s
        elif num_tokens and self._last_s is not None:
            self._metrics.itl.observe((now_s - self._last_s) / num_tokens, num_tokens)
            self._last_s = now_s
        self._num_tokens += num_tokens
        if is_last:
            self._metrics.e2e.observe(now_s - self._arrival_s)
            self._metrics.generation_tokens.observe(self._num_tokens)


@dataclass(frozen=True, eq=False)
class Snapshot(Collector):
    """One scrape: what the engine said and what the front has counted."""

    model_name: str
    metrics: ServerMetrics
    info: EngineInfo | None  # None while loading
    stats: EngineStats | None
    num_abandoned: int  # sequences whose client left

    def collect(self) -> Iterable[Metric]:
        """Returns every family under both prefixes."""
        for prefix in ("jaxserve:", "vllm:"):
            for histogram in self.metrics.histograms():
                yield histogram.family(prefix, self.model_name)
            if self.info is not None and self.stats is not None:
                yield from self._shared(prefix, self.info, self.stats)
        if self.info is not None and self.stats is not None:
            yield from self._own(self.info, self.stats)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help, labels=["model_name"])
        family.add_metric([self.model_name], value)
        return family

    def _shared(self, prefix: str, info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
        """Returns what vLLM has a name for."""
        used = 1 - stats.num_pages_free / max(stats.num_pages, 1)
        for name, help, value in (
            ("num_requests_running", "Sequences that hold a slot", stats.num_running),
            ("num_requests_waiting", "Sequences that wait for a slot", stats.num_waiting),
            ("kv_cache_usage_perc", "Part of the KV pages in use, 0 to 1", used),
        ):
            yield self._gauge(prefix + name, help, value)
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens taken", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated", stats.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found cached", stats.prefix_hits),
            ("num_preemptions", "Sequences set back to waiting", stats.num_preemptions),
        ):
            yield self._counter(prefix + name, help, value)
        finished = CounterMetricFamily(
            prefix + "request_success",
            "Sequences finished",
            labels=["model_name", "finished_reason"],
        )
        num_finished = {**self.metrics.num_finished, "abort": self.num_abandoned}
        for reason in sorted({"stop", "length", *num_finished}):
            finished.add_metric([self.model_name, reason], num_finished.get(reason, 0))
        yield finished
        # The engine keeps the total alone, so there are no buckets.
        queued = SummaryMetricFamily(
            prefix + "request_queue_time_seconds",
            "From arrival to the first step",
            labels=["model_name"],
        )
        num_started = sum(stats.num_finished.values()) + stats.num_running
        queued.add_metric([self.model_name], num_started, stats.queue_s)
        yield queued
        cache = {"block_size": str(info.page_size), "num_gpu_blocks": str(info.num_pages)}
        config = GaugeMetricFamily(
            prefix + "cache_config_info", "The KV cache", labels=["model_name", *cache]
        )
        config.add_metric([self.model_name, *cache.values()], 1)
        yield config

    def _own(self, info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
        """Returns what only jaxserve has."""
        yield self._gauge("jaxserve:kv_pages", "KV pages", stats.num_pages)
        yield self._gauge("jaxserve:kv_pages_free", "KV pages not in use", stats.num_pages_free)
        for name, help, value in (
            ("steps", "Steps run", stats.num_steps),
            (
                "compiles_since_ready",
                "Programs compiled while serving",
                stats.num_compiles_since_ready,
            ),
            ("host_gap_seconds", "Time the device waited for the host", stats.host_gap_s),
            ("step_seconds", "Time spent in steps", stats.step_s),
        ):
            yield self._counter(f"jaxserve:{name}", help, value)
        facts = {
            "device": info.device,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "kv_cache_dtype": info.kv_cache_dtype,
            "attention": info.attention,
            "mesh": info.mesh,
            "num_processes": str(info.num_processes),
            "max_model_len": str(info.max_model_len),
            "max_num_seqs": str(info.max_num_seqs),
            "num_programs": str(info.num_programs),
        }
        engine = GaugeMetricFamily(
            "jaxserve:engine_info", "What was chosen at start", labels=["model_name", *facts]
        )
        engine.add_metric([self.model_name, *facts.values()], 1)
        yield engine


def render(snapshot: Snapshot) -> bytes:
    """Returns the text that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(snapshot)
    ProcessCollector(registry=registry)
    return generate_latest(registry)
