#!/usr/bin/env python
"""Compares jaxserve with transformers `generate` and running servers: one machine, one sitting.

    .venv/bin/python scripts/bench_engine.py --rounds 3 --url llama.cpp=http://127.0.0.1:8080

Rounds are interleaved: each contender runs once before any runs again, so that a machine that
slows down slows all. Each contender has a process of its own, so that none's threads disturb
another's. Prompts are random and new in every measurement, so no prefix is cached.

Needs an idle machine: thread pools that spin at barriers, torch's above all, lose an order of
magnitude to a busy neighbour, and ratios then mean nothing. So each measurement notes the share of
the cores that other processes used, and figures taken on a busy machine are marked as not valid.
Writes results.csv, results.json and plot.png. Needs the `test` extra and the demo model.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # tests/checkpoints.py writes the demo model as a folder

from jaxserve.bench.offline import random_prompts, timed_generate  # noqa: E402
from jaxserve.bench.serve import measure  # noqa: E402
from jaxserve.options import ServeBenchOptions  # noqa: E402

Prompts = Sequence[Sequence[int]]
# Prompts and how many tokens to generate -> seconds.
Generate = Callable[[Prompts, int], float]
MAX_OTHERS = 0.05  # share of the cores that others may use before figures are not valid


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One timing, and the share of all cores that other processes used meanwhile."""

    seconds: float
    others: float | None  # None for a server, whose own use cannot be told from others'


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An engine or server at one precision; it has been warmed up."""

    name: str
    dtype: str  # "as served" for a server: its own affair
    measure: Callable[[Prompts, int], Measurement]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of work. An output of one token measures prefill."""

    batch: int
    prompt_len: int
    output_len: int

    @property
    def label(self) -> str:
        """How tables and plots call it."""
        return f"prefill {self.prompt_len}" if self.output_len == 1 else f"batch {self.batch}"

    def rate(self, seconds: float) -> float:
        """Tokens in a second: prompt tokens when measuring prefill, else output tokens."""
        length = self.prompt_len if self.output_len == 1 else self.output_len
        return self.batch * length / seconds


@dataclass(frozen=True, kw_only=True)
class Result:
    """The rates of one contender in one case, one for each round."""

    name: str
    dtype: str
    case: Case
    rates: tuple[float, ...]
    others: tuple[float | None, ...]  # of each rate, as in `Measurement`

    @property
    def is_valid(self) -> bool:
        """False when other processes kept the machine busy."""
        return all(share is None or share <= MAX_OTHERS for share in self.others)

    @property
    def median(self) -> float:
        """Median tokens in a second."""
        return statistics.median(self.rates)


def main() -> None:
    """Runs all rounds and writes the table and the plot."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cases = [
        Case(batch=batch, prompt_len=args.prompt_len, output_len=args.output_len)
        for batch in args.batch
    ]
    cases.append(Case(batch=1, prompt_len=args.prefill_len, output_len=1))
    results: list[Result] = []
    for dtype in args.dtype:
        with open_contenders(args, dtype, max(args.batch)) as contenders:
            results += run_rounds(contenders, cases, args.rounds)
    if args.url:
        results += run_rounds([server(*entry) for entry in args.url], cases, args.rounds)
    print(table(results))
    write_files(args.out, results)
    plot(args.out / "plot.png", results)
    print(f"written to {args.out}: results.csv results.json plot.png")


def parse_args() -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--prefill-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dtype", nargs="*", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--url", type=named_url, action="append", default=[], help="NAME=URL of a server"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench_engine")
    return parser.parse_args()


def named_url(text: str) -> tuple[str, str]:
    """Returns name and URL of `NAME=URL`."""
    name, equals, url = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("give NAME=URL")
    return name, url


@contextmanager
def open_contenders(
    args: argparse.Namespace, dtype: str, max_batch: int
) -> Iterator[list[Contender]]:
    """Yields jaxserve and transformers at one precision, warmed up; ends them afterwards."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(in_own_process(name, args, dtype, max_batch)) for name in ENGINES
        ]


@contextmanager
def in_own_process(
    name: str, args: argparse.Namespace, dtype: str, max_batch: int
) -> Iterator[Contender]:
    """Yields an engine that runs in a new process."""
    # Not forked: neither jax nor torch survives that.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(name, args, dtype, max_batch, theirs))
    process.start()
    theirs.close()  # so that the pipe ends when the process does

    def measure(prompts: Prompts, output_len: int) -> Measurement:
        ours.send((prompts, output_len))
        measurement: Measurement = ours.recv()
        return measurement

    try:
        ours.recv()  # warmed up
        yield Contender(name=name, dtype=dtype, measure=measure)
        ours.send(None)
    except EOFError:
        raise SystemExit(f"{name} {dtype} died; its message is above") from None
    finally:
        ours.close()
        process.join()


def work(name: str, args: argparse.Namespace, dtype: str, max_batch: int, pipe: Connection) -> None:
    """Runs one engine, in a process of its own, until told to end or left alone."""
    with ENGINES[name](args, dtype, max_batch) as generate:
        generate(random_prompts(1, args.prompt_len, seed=10**6), 2)
        pipe.send("warmed up")
        try:
            while (task := pipe.recv()) is not None:
                pipe.send(measured(generate, *task))
        except EOFError:
            pass


def measured(generate: Generate, prompts: Prompts, output_len: int) -> Measurement:
    """Returns the time it takes, and what other processes used of the machine meanwhile."""
    busy_s, own_s, started = machine_busy_s(), time.process_time(), time.perf_counter()
    seconds = generate(prompts, output_len)
    wall_s = time.perf_counter() - started
    others_s = (machine_busy_s() - busy_s) - (time.process_time() - own_s)
    share = others_s / (wall_s * (os.cpu_count() or 1))
    return Measurement(seconds=seconds, others=max(share, 0.0))


def machine_busy_s() -> float:
    """Returns the processor seconds that all processes have used since the machine started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


@contextmanager
def open_jaxserve(args: argparse.Namespace, dtype: str, max_batch: int) -> Iterator[Generate]:
    """Yields the engine through its offline API."""
    from jaxserve import LLM

    max_model_len = max(args.prompt_len + args.output_len, args.prefill_len + 1)
    with LLM("demo", dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_batch) as llm:
        yield lambda prompts, output_len: timed_generate(llm, prompts, output_len)


@contextmanager
def open_transformers(args: argparse.Namespace, dtype: str, max_batch: int) -> Iterator[Generate]:
    """Yields transformers' `generate` on torch: one static batch of any size, on all cores."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(demo_folder(args.out), dtype=dtype).eval()

    def generate(prompts: Prompts, output_len: int) -> float:
        tokens = torch.tensor(prompts)
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=output_len,
                min_new_tokens=output_len,
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - started
        assert output.shape[1] == tokens.shape[1] + output_len, output.shape
        return seconds

    yield generate


Open = Callable[[argparse.Namespace, str, int], AbstractContextManager[Generate]]
ENGINES: dict[str, Open] = {"jaxserve": open_jaxserve, "transformers": open_transformers}


def demo_folder(out: Path) -> Path:
    """Returns the demo model as a Hugging Face folder, written once."""
    from tests.checkpoints import demo_as_hf_folder

    folder = out / "demo-hf"
    if not (folder / "tokenizer_config.json").exists():  # the last file to be written
        demo_as_hf_folder(folder)
    return folder


def server(name: str, url: str) -> Contender:
    """Returns a server, asked for as many streams at once as the batch is large."""
    seeds = iter(range(10**9))

    def measure_server(prompts: Prompts, output_len: int) -> Measurement:
        options = ServeBenchOptions(
            base_url=url,
            num_prompts=len(prompts),
            random_input_len=len(prompts[0]),
            random_output_len=output_len,
            ignore_eos=True,
            num_warmups=0,
            seed=next(seeds),
        )
        figures, errors = asyncio.run(measure(options))
        if errors:
            raise SystemExit(f"{name}: {errors[0]}")
        expected = len(prompts) * output_len
        assert figures["total_output_tokens"] == expected, f"{name} ignores ignore_eos"
        return Measurement(seconds=figures["duration"], others=None)

    return Contender(name=name, dtype="as served", measure=measure_server)


def run_rounds(contenders: Sequence[Contender], cases: Sequence[Case], rounds: int) -> list[Result]:
    """Returns one result for each contender and case."""
    taken: dict[tuple[Contender, Case], list[Measurement]] = {
        (contender, case): [] for case in cases for contender in contenders
    }
    for round_number in range(rounds):
        for seed, (contender, case) in enumerate(taken):
            prompts = random_prompts(case.batch, case.prompt_len, seed + 1000 * round_number)
            measurement = contender.measure(prompts, case.output_len)
            taken[contender, case].append(measurement)
            others = measurement.others
            print(
                f"round {round_number + 1}/{rounds}  {contender.name:<14} {contender.dtype:<10} "
                f"{case.label:<12} {case.rate(measurement.seconds):9.1f} tok/s"
                f"{'' if others is None else f'  others used {others:.0%} of the machine'}",
                flush=True,
            )
    return [
        Result(
            name=contender.name,
            dtype=contender.dtype,
            case=case,
            rates=tuple(case.rate(measurement.seconds) for measurement in measurements),
            others=tuple(measurement.others for measurement in measurements),
        )
        for (contender, case), measurements in taken.items()
    ]


def table(results: Sequence[Result]) -> str:
    """Returns a table of medians, ranges and the ratio to transformers at the same precision."""
    lines = [
        f"{'case':<12} {'dtype':<10} {'engine':<14} {'median tok/s':>12} "
        f"{'min':>9} {'max':>9} {'x transformers':>15}"
    ]
    for result in sorted(results, key=lambda result: (result.dtype, result.case.output_len == 1)):
        ratio = ratio_to_transformers(result, results)
        lines.append(
            f"{result.case.label:<12} {result.dtype:<10} {result.name:<14} {result.median:>12.1f} "
            f"{min(result.rates):>9.1f} {max(result.rates):>9.1f} "
            f"{'' if ratio is None else format(ratio, '.2f'):>15}"
            f"{'' if result.is_valid else '  NOT VALID'}"
        )
    if not all(result.is_valid for result in results):
        lines.append(
            f"NOT VALID: other processes used more than {MAX_OTHERS:.0%} of the machine in at "
            "least one round; run it again on an idle one before drawing any conclusion"
        )
    return "\n".join(lines)


def ratio_to_transformers(result: Result, results: Sequence[Result]) -> float | None:
    """Returns how many times transformers' rate it is; None where that is not known."""
    for other in results:
        is_reference = (other.name, other.dtype, other.case) == (
            "transformers",
            result.dtype,
            result.case,
        )
        if is_reference and result.is_valid and other.is_valid:
            return result.median / other.median
    return None


def write_files(out: Path, results: Sequence[Result]) -> None:
    """Writes results.csv, and results.json with the machine it was measured on."""
    rows: list[dict[str, Any]] = [
        {
            "name": result.name,
            "dtype": result.dtype,
            **dataclasses.asdict(result.case),
            "median_tokens_per_second": round(result.median, 2),
            "rates": [round(rate, 2) for rate in result.rates],
            "others": result.others,
            "is_valid": result.is_valid,
        }
        for result in results
    ]
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    document = {"machine": machine, "model": "demo", "results": rows}
    (out / "results.json").write_text(json.dumps(document, indent=2) + "\n")


def cpu_name() -> str:
    """Returns the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def plot(path: Path, results: Sequence[Result]) -> None:
    """Draws one panel for each case, one bar for each contender, and writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(result.case for result in results))
    figure, axes = pyplot.subplots(1, len(cases), figsize=(3.2 * len(cases), 4), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        bars = [result for result in results if result.case == case]
        labels = [f"{bar.name}\n{bar.dtype}" for bar in bars]
        colors = ["tab:orange" if bar.name == "jaxserve" else "tab:gray" for bar in bars]
        drawn = axis.bar(labels, [bar.median for bar in bars], color=colors)
        axis.bar_label(drawn, fmt="%.0f")
        axis.set_title(case.label)
        axis.tick_params(axis="x", rotation=90, labelsize=8)
    axes[0][0].set_ylabel("tokens/s, median")
    is_valid = all(result.is_valid for result in results)
    warning = "" if is_valid else "  (NOT VALID: the machine was busy)"
    figure.suptitle(f"demo model on {cpu_name()}{warning}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
