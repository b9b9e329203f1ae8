"""The figures of a benchmark: `vllm bench`'s names, computed and printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RequestResult:
    """What one request took. Times in seconds."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float  # from sending to the first token
    itl_s: tuple[float, ...]  # gaps between successive events with text
    e2el_s: float  # from sending to the end of the stream

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.e2el_s - self.ttft_s) / max(self.output_tokens - 1, 1)


def serve_figures(
    results: Sequence[RequestResult], num_failed: int, duration_s: float
) -> dict[str, float]:
    """Returns the figures of a serving benchmark under the keys of vLLM's result file."""
    prompt_tokens = sum(result.prompt_tokens for result in results)
    output_tokens = sum(result.output_tokens for result in results)
    figures: dict[str, float] = {
        "completed": len(results),
        "failed": num_failed,
        "duration": duration_s,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(results) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration_s,
    }
    samples = {
        "ttft": [result.ttft_s for result in results],
        # A single token has no time between tokens.
        "tpot": [result.tpot_s for result in results if result.output_tokens > 1],
        "itl": [gap for result in results for gap in result.itl_s],
        "e2el": [result.e2el_s for result in results],
    }
    for name, seconds in samples.items():
        figures |= summary(name, seconds)
    return figures


def summary(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Returns mean, median and 99th percentile in milliseconds; nothing if there are no samples."""
    if not seconds:
        return {}
    ms = np.asarray(seconds) * 1e3  # [samples]
    return {
        f"mean_{name}_ms": float(np.mean(ms)),
        f"median_{name}_ms": float(np.median(ms)),
        f"p99_{name}_ms": float(np.percentile(ms, 99)),
    }


_SERVE_LINES = (
    ("completed", "Successful requests:"),
    ("failed", "Failed requests:"),
    ("duration", "Benchmark duration (s):"),
    ("total_input_tokens", "Total input tokens:"),
    ("total_output_tokens", "Total generated tokens:"),
    ("request_throughput", "Request throughput (req/s):"),
    ("output_throughput", "Output token throughput (tok/s):"),
    ("total_token_throughput", "Total token throughput (tok/s):"),
)
_SERVE_SECTIONS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)


def serve_table(figures: dict[str, float]) -> str:
    """Returns the figures as `vllm bench serve` prints them."""
    lines = [" Serving Benchmark Result ".center(50, "=")]
    lines += [_line(title, figures[key]) for key, title in _SERVE_LINES]
    for key, short, title in _SERVE_SECTIONS:
        if f"mean_{key}_ms" not in figures:
            continue
        lines.append(title.center(50, "-"))
        for statistic, word in (("mean", "Mean"), ("median", "Median"), ("p99", "P99")):
            lines.append(_line(f"{word} {short} (ms):", figures[f"{statistic}_{key}_ms"]))
    return "\n".join([*lines, "=" * 50])


def _line(title: str, value: float) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{title:<39} {shown:>10}"


def save(path: str, figures: dict[str, Any]) -> None:
    """Writes figures as JSON; an empty path writes nothing."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=2) + "\n")
