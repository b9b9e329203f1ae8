"""/metrics: the engine's counters and the front's timings, under our names and vLLM's.

Dashboards, autoscalers and routers look for vLLM's names, so each value is exported under both
prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jaxserve.engine.info import STEP_TOKEN_BOUNDS, EngineInfo, EngineStats
from jaxserve.server.metrics import ServerMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# The labels' values that a scrape shows from the start, so that rates exist before an event does.
FINISH_REASONS = ("abort", "error", "length", "repetition", "stop")
REJECTIONS = ("max_num_queued_reqs",)


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
            yield from self._front(prefix)
            if self.info is not None and self.stats is not None:
                yield from self._shared(prefix, self.info, self.stats)
        if self.info is not None and self.stats is not None:
            yield from self._own(self.info, self.stats)
        yield from self._http()

    @property
    def _labels(self) -> dict[str, str]:
        return {"model_name": self.model_name, "engine": "0"}

    def _gauge(self, name: str, help: str, value: float, **labels: str) -> Metric:
        labels = {**self._labels, **labels}
        family = GaugeMetricFamily(name, help, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _counter(
        self, name: str, help: str, values: Mapping[str, float] | float, label: str = ""
    ) -> Metric:
        """Returns a counter, or one for each value of `label`."""
        family = CounterMetricFamily(
            name, help, labels=[*self._labels, label] if label else list(self._labels)
        )
        for key, value in values.items() if isinstance(values, Mapping) else [("", values)]:
            family.add_metric(
                [*self._labels.values(), key][: len(self._labels) + bool(label)], value
            )
        return family

    def _front(self, prefix: str) -> Iterator[Metric]:
        """Returns what the front has counted, which is there while the engine still loads."""
        for histogram in self.metrics.histograms():
            yield _histogram(
                prefix + histogram.name,
                histogram.help,
                histogram.bounds,
                [(self._labels, histogram.counts, histogram.sum)],
            )
        finished: dict[str, int] = {
            **self.metrics.num_finished,
            "abort": self.num_abandoned,
            "error": self.metrics.num_failed,
        }
        yield self._counter(
            prefix + "request_success",
            "Sequences finished",
            {reason: finished.get(reason, 0) for reason in FINISH_REASONS},
            "finished_reason",
        )
        rejected = self.metrics.num_rejected
        yield self._counter(
            prefix + "admission_rejections",
            "Requests refused because too many waited",
            {reason: rejected.get(reason, 0) for reason in REJECTIONS},
            "reason",
        )

    def _shared(self, prefix: str, info: EngineInfo, stats: EngineStats) -> Iterator[Metric]:
        """Returns what the engine says and vLLM has a name for."""
        used = 1 - stats.num_pages_free / max(stats.num_pages, 1)
        for name, help, value in (
            ("num_requests_running", "Sequences that hold a slot", stats.num_running),
            ("num_requests_waiting", "Sequences that wait for a slot", stats.num_waiting),
            ("kv_cache_usage_perc", "Part of the KV pages in use, 0 to 1", used),
        ):
            yield self._gauge(prefix + name, help, value)
        waiting = self._gauge(
            prefix + "num_requests_waiting_by_reason",
            "Sequences that wait, and for what",
            stats.num_waiting,
            reason="capacity",
        )
        # Nothing here waits for anything but a slot and pages.
        waiting.add_sample(waiting.name, {**self._labels, "reason": "deferred"}, 0)
        yield waiting
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens taken", stats.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens whose pages were reused", stats.prefix_hits),
            ("generation_tokens", "Tokens generated", stats.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found cached", stats.prefix_hits),
            ("num_preemptions", "Sequences set back to waiting", stats.num_preemptions),
        ):
            yield self._counter(prefix + name, help, value)
        yield _histogram(
            prefix + "iteration_tokens_total",
            "Tokens computed in a step",
            STEP_TOKEN_BOUNDS,
            [(self._labels, stats.step_tokens, stats.step_tokens_sum)],
        )
        num_tokens = info.page_size * info.num_pages
        yield self._gauge(
            prefix + "cache_config_info",
            "The KV cache",
            1,
            block_size=str(info.page_size),
            num_gpu_blocks=str(info.num_pages),
            cache_dtype=info.kv_cache_dtype,
            enable_prefix_caching=str(info.enable_prefix_caching),
            kv_cache_size_tokens=str(num_tokens),
            kv_cache_max_concurrency=f"{num_tokens / info.max_model_len:.2f}",
        )

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
        yield self._gauge(
            "jaxserve:engine_info",
            "What was chosen at start",
            1,
            device=info.device,
            dtype=info.dtype,
            quantization=info.quantization,
            kv_cache_dtype=info.kv_cache_dtype,
            attention=info.attention,
            experts=info.experts,
            products=info.products,
            mesh=info.mesh,
            num_processes=str(info.num_processes),
            max_model_len=str(info.max_model_len),
            max_num_seqs=str(info.max_num_seqs),
            num_programs=str(info.num_programs),
        )

    def _http(self) -> Iterator[Metric]:
        """Returns what every web service has, by the names that FastAPI's exporter made usual."""
        counts = CounterMetricFamily(
            "http_requests", "HTTP requests", labels=["handler", "method", "status"]
        )
        for key, count in sorted(self.metrics.num_http.items()):
            counts.add_metric(list(key), count)
        yield counts
        timed = sorted(self.metrics.http_seconds.items())
        if timed:
            first = timed[0][1]
            yield _histogram(
                first.name,
                first.help,
                first.bounds,
                [
                    ({"handler": path, "method": method}, histogram.counts, histogram.sum)
                    for (path, method), histogram in timed
                ],
            )


def _histogram(
    name: str,
    help: str,
    bounds: Sequence[float],
    series: Sequence[tuple[Mapping[str, str], Sequence[int], float]],  # labels, counts, sum
) -> Metric:
    """Returns a family as Prometheus reads it, buckets cumulative."""
    family = HistogramMetricFamily(name, help, labels=list(series[0][0]))
    for labels, counts, total in series:
        buckets, count = [], 0
        for bound, more in zip((*bounds, float("inf")), counts, strict=True):
            count += more
            buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(count)))
        family.add_metric(list(labels.values()), buckets, total)
    return family


def render(snapshot: Snapshot) -> bytes:
    """Returns the text that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(snapshot)
    ProcessCollector(registry=registry)
    return generate_latest(registry)
