"""Measures what grammars cost: the same batch with and without them, in turn, in one run.

    python scripts/bench_grammar.py [--model demo] [--batch 32] [--tokens 64] [--rounds 5]

The schema never ends, so that every row runs for the same number of steps. Ratios are of medians
over the rounds, each of which runs every case once; a machine that is busy elsewhere slows all
cases alike.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

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


def measure(llm: LLM, batch: int, num_tokens: int, rounds: int) -> dict[str, list[tuple]]:
    """Returns for each case and round the batch's tokens/s and those of its first request."""
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
    rates: dict[str, list[tuple]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, params in cases.items():
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
            if turn:  # the first warms up
                rates[name].append((sum(map(rate_of, outputs)), rate_of(outputs[0])))
    return rates


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with LLM(args.model, max_num_seqs=args.batch, max_model_len=512) as llm:
        rates = measure(llm, args.batch, args.tokens, args.rounds)
    base = [statistics.median(column) for column in zip(*rates["no grammar"], strict=True)]
    print(f"| batch of {args.batch} | tokens/s | ratio | first request, tokens/s | ratio |")
    print("|---|---|---|---|---|")
    for name, values in rates.items():
        batch, first = (statistics.median(column) for column in zip(*values, strict=True))
        print(
            f"| {name} | {batch:.1f} | {batch / base[0]:.3f} "
            f"| {first:.2f} | {first / base[1]:.3f} |"
        )


if __name__ == "__main__":
    main()
