"""The engine alone, through `LLM`: tokens in a second, and the time of one batch."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxserve.bench.report import save, summary
from jaxserve.config import EngineConfig
from jaxserve.engine.request import SamplingParams
from jaxserve.options import LatencyBenchOptions, ThroughputBenchOptions

if TYPE_CHECKING:
    from jaxserve.llm import LLM


def run_throughput_bench(config: EngineConfig, options: ThroughputBenchOptions) -> int:
    """Generates from all prompts at once, prints the rates and returns 0."""
    with open_llm(config) as llm:
        prompts = random_prompts(options.num_prompts, options.input_len, config.seed)
        duration_s = timed_generate(llm, prompts, options.output_len)
    output_tokens = options.num_prompts * options.output_len
    total_tokens = output_tokens + options.num_prompts * options.input_len
    figures = {
        "elapsed_time": duration_s,
        "num_requests": options.num_prompts,
        "total_num_tokens": total_tokens,
        "requests_per_second": options.num_prompts / duration_s,
        "tokens_per_second": total_tokens / duration_s,
        "output_tokens_per_second": output_tokens / duration_s,
    }
    print(
        f"Throughput: {figures['requests_per_second']:.2f} requests/s, "
        f"{figures['tokens_per_second']:.2f} total tokens/s, "
        f"{figures['output_tokens_per_second']:.2f} output tokens/s"
    )
    save(options.save_result, {**dataclasses.asdict(options), **figures})
    return 0


def run_latency_bench(config: EngineConfig, options: LatencyBenchOptions) -> int:
    """Runs one batch again and again, prints the time it takes and returns 0."""
    durations_s = []
    with open_llm(config) as llm:
        for index in range(options.num_iters_warmup + options.num_iters):
            # New prompts each time: a cached prefix would make later batches look quicker.
            seed = config.seed + index
            prompts = random_prompts(options.batch_size, options.input_len, seed)
            duration_s = timed_generate(llm, prompts, options.output_len)
            if index >= options.num_iters_warmup:
                durations_s.append(duration_s)
    figures = summary("latency", durations_s)
    for statistic in ("mean", "median", "p99"):
        print(f"{statistic.capitalize()} latency: {figures[f'{statistic}_latency_ms']:.1f} ms")
    save(options.save_result, {**dataclasses.asdict(options), **figures})
    return 0


def open_llm(config: EngineConfig) -> LLM:
    """Returns the offline engine for a config. Imports jax."""
    from jaxserve.llm import LLM

    return LLM(**dataclasses.asdict(config))


def random_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Returns prompts of random token ids, the same for the same seed, of exactly `length`."""
    # Ids that every vocabulary in use has, above the special tokens that start most of them.
    rng = random.Random(seed)
    return [[rng.randrange(1000, 32000) for _ in range(length)] for _ in range(count)]


def timed_generate(llm: LLM, prompts: Sequence[Sequence[int]], output_len: int) -> float:
    """Returns the seconds it takes to generate exactly `output_len` tokens for each prompt."""
    params = SamplingParams(
        temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False
    )
    started = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False
    )
    duration_s = time.perf_counter() - started
    lengths = {len(output.outputs[0].token_ids) for output in outputs}
    assert lengths == {output_len}, f"asked for {output_len} tokens, got {sorted(lengths)}"
    return duration_s
