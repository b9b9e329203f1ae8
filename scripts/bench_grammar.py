"""Measures what grammars cost: the same batch with and without them, in turn, in one run.

    python scripts/bench_grammar.py [--model demo] [--batch 32] [--tokens 64] [--rounds 9]

The schema never ends, so that every row runs for the same number of steps. Each round runs every
case once, in turning order; a ratio is the median of the rounds' ratios, with the quartiles, so
that a machine that is busy elsewhere slows all cases alike: where the quartiles are far apart, go
by the CPU time, all threads', which others hardly change. `idle` is how long the device waited for
the host, a step: at most, and in the best round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import NamedTuple

from jaxserve import LLM, RequestOutput, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "married": {"type": "boolean"},
            "city": {"enum": ["Bern", "Oslo", "Porto", "Riga"]},
        },
        "required": ["name", "age", "married", "city"],
        "additionalProperties": False,
    },
}


def rate_of(output: RequestOutput) -> float:
    """Returns a request's tokens per second after its first token."""
    metrics = output.metrics
    assert metrics is not None and metrics.first_token_time is not None
    num_tokens = len(output.outputs[0].token_ids)
    return (num_tokens - 1) / (metrics.finished_time - metrics.first_token_time)


class Turn(NamedTuple):
    """What one case did in one round."""

    batch: float  # tokens/s
    first: float  # tokens/s of the first request
    cpu_s: float  # of all threads
    idle_ms: float  # of the device, a step


def measure(llm: LLM, batch: int, num_tokens: int, rounds: int) -> dict[str, list[Turn]]:
    """Returns for each case what it did in each round."""
    plain = SamplingParams(temperature=0.8, seed=1, max_tokens=num_tokens, ignore_eos=True)
    kept = SamplingParams(
        temperature=0.8,
        seed=1,
        max_tokens=num_tokens,
        ignore_eos=True,
        structured_outputs=StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    )
    cases = {
        "no grammar": [plain] * batch,
        "grammar on all": [kept] * batch,
        "grammar on all but one": [plain] + [kept] * (batch - 1),
    }
    prompts = [f"List number {index} of people in JSON: " for index in range(batch)]
    turns: dict[str, list[Turn]] = defaultdict(list)
    names = list(cases)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            before, before_s = llm._client.stats(), time.process_time()
            outputs = llm.generate(prompts, cases[name], use_tqdm=False)
            after, cpu_s = llm._client.stats(), time.process_time() - before_s
            assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
            idle_s = after.host_gap_s - before.host_gap_s
            idle_ms = 1000 * idle_s / (after.num_steps - before.num_steps)
            if number:  # the first round warms up
                rates = [rate_of(output) for output in outputs]
                turns[name].append(Turn(sum(rates), rates[0], cpu_s, idle_ms))
    return {name: turns[name] for name in names}


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Returns the median of the rounds' ratios, and the quartiles."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with LLM(args.model, max_num_seqs=args.batch, max_model_len=512) as llm:
        turns = measure(llm, args.batch, args.tokens, args.rounds)
    base = list(zip(*turns["no grammar"], strict=True))
    print(
        f"| batch of {args.batch} | tokens/s | ratio | first request: ratio | CPU time: ratio "
        "| idle, ms a step |"
    )
    print("|---|---|---|---|---|---|")
    for name, values in turns.items():
        batch, first, cpu, idle = zip(*values, strict=True)
        print(
            f"| {name} | {statistics.median(batch):.1f} | {ratio(batch, base[0])} "
            f"| {ratio(first, base[1])} | {ratio(cpu, base[2])} | {min(idle):.2f} |"
        )


if __name__ == "__main__":
    main()
