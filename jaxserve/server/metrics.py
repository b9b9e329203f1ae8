"""What the front counts and times; `exposition` writes it out for Prometheus.

The event loop's thread owns it all: an observation is a bisection, no lock.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from jaxserve.engine.request import Request, Timeline

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
HTTP_BUCKETS_S = (0.1, 0.5, 1.0)
TOKEN_COUNT_BUCKETS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
SAMPLE_COUNT_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 128.0)
PREEMPTION_BUCKETS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)


class Histogram:
    """Observations counted by bucket."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = help
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Counts `value`, `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class ServerMetrics:
    """The front's counters and timings."""

    def __init__(self) -> None:
        self.ttft = Histogram(
            "time_to_first_token_seconds", "From arrival to the first token", TTFT_BUCKETS_S
        )
        self.itl = Histogram(
            "inter_token_latency_seconds", "Between tokens of a sample", TOKEN_BUCKETS_S
        )
        self.tpot = Histogram(
            "request_time_per_output_token_seconds",
            "Between tokens, the mean of each sample",
            TOKEN_BUCKETS_S,
        )
        self.e2e = Histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", REQUEST_BUCKETS_S
        )
        self.queue = Histogram(
            "request_queue_time_seconds", "From arrival to the first step", REQUEST_BUCKETS_S
        )
        self.prefill = Histogram(
            "request_prefill_time_seconds",
            "From the first step to the first token",
            REQUEST_BUCKETS_S,
        )
        self.decode = Histogram(
            "request_decode_time_seconds", "From the first token to the last", REQUEST_BUCKETS_S
        )
        self.inference = Histogram(
            "request_inference_time_seconds", "From the first step to the last", REQUEST_BUCKETS_S
        )
        self.prompt_tokens = Histogram(
            "request_prompt_tokens", "Prompt tokens of a request", TOKEN_COUNT_BUCKETS
        )
        self.generation_tokens = Histogram(
            "request_generation_tokens", "Tokens generated for a sample", TOKEN_COUNT_BUCKETS
        )
        self.max_generation_tokens = Histogram(
            "request_max_num_generation_tokens",
            "Tokens of a prompt's longest sample",
            TOKEN_COUNT_BUCKETS,
        )
        self.params_n = Histogram("request_params_n", "n asked for", SAMPLE_COUNT_BUCKETS)
        self.params_max_tokens = Histogram(
            "request_params_max_tokens", "max_tokens of a request", TOKEN_COUNT_BUCKETS
        )
        self.preemptions = Histogram(
            "request_num_preemptions", "How often a sample was set back", PREEMPTION_BUCKETS
        )
        # As clients see it: to the engine, a stop string's end is an abort.
        self.num_finished: Counter[str] = Counter()
        self.num_failed = 0  # samples that the engine could not finish
        self.num_rejected: Counter[str] = Counter()  # by the option whose limit was reached
        self.num_http: Counter[tuple[str, str, str]] = Counter()  # by path, method, status class
        self.http_seconds: dict[tuple[str, str], Histogram] = {}  # by path and method

    def histograms(self) -> Iterator[Histogram]:
        """Returns every histogram that both prefixes share."""
        yield from (self.ttft, self.itl, self.tpot, self.e2e)
        yield from (self.queue, self.prefill, self.decode, self.inference)
        yield from (self.prompt_tokens, self.generation_tokens, self.max_generation_tokens)
        yield from (self.params_n, self.params_max_tokens, self.preemptions)

    def observe_samples(self, samples: Sequence[Request]) -> None:
        """Counts one prompt's samples as they are admitted."""
        self.prompt_tokens.observe(len(samples[0].prompt_tokens))
        self.params_n.observe(len(samples))
        self.params_max_tokens.observe(samples[0].params.max_tokens or 0)

    def observe_http(self, path: str, method: str, status: int, seconds: float) -> None:
        """Counts an HTTP request that has ended."""
        self.num_http[path, method, f"{status // 100}xx"] += 1
        if (path, method) not in self.http_seconds:
            self.http_seconds[path, method] = Histogram(
                "http_request_duration_seconds", "From headers to the last byte", HTTP_BUCKETS_S
            )
        self.http_seconds[path, method].observe(seconds)


class SampleClock:
    """Times one sample's tokens into the histograms."""

    def __init__(self, metrics: ServerMetrics, arrival_s: float) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._first_s: float | None = None
        self._last_s = 0.0
        self._timeline: Timeline | None = None
        self.num_tokens = 0

    def tick(self, num_tokens: int, timeline: Timeline | None, *, is_last: bool) -> None:
        """Notes tokens that have come just now."""
        now_s = time.monotonic()
        metrics = self._metrics
        if timeline is not None and self._timeline is None:
            metrics.queue.observe(max(0.0, timeline.started_s - self._arrival_s))
        self._timeline = timeline or self._timeline
        if num_tokens and self._first_s is None:
            metrics.ttft.observe(now_s - self._arrival_s)
            if self._timeline is not None:
                metrics.prefill.observe(max(0.0, now_s - self._timeline.started_s))
            self._first_s = self._last_s = now_s
        elif num_tokens:
            metrics.itl.observe((now_s - self._last_s) / num_tokens, num_tokens)
            self._last_s = now_s
        self.num_tokens += num_tokens
        if is_last:
            self._end(now_s)

    def _end(self, now_s: float) -> None:
        metrics = self._metrics
        metrics.e2e.observe(now_s - self._arrival_s)
        metrics.generation_tokens.observe(self.num_tokens)
        # A beam has no timeline: it comes whole, out of many requests to the engine.
        if self._timeline is None or self._first_s is None:
            return
        metrics.decode.observe(self._last_s - self._first_s)
        if self.num_tokens > 1:
            metrics.tpot.observe((self._last_s - self._first_s) / (self.num_tokens - 1))
        metrics.inference.observe(max(0.0, now_s - self._timeline.started_s))
        metrics.preemptions.observe(self._timeline.num_preemptions)
