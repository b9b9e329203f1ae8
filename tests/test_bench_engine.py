"""What the comparison script concludes, and when it refuses to."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "scripts" / "bench_engine.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_engine", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_engine"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def results(script, others):
    case = script.Case(batch=8, prompt_len=128, output_len=128)
    return [
        script.Result(name=name, dtype="float32", case=case, rates=rates, others=others)
        for name, rates in (("jaxserve", (20.0, 30.0, 90.0)), ("transformers", (10.0, 12.0, 11.0)))
    ]


def test_the_ratio_is_that_of_the_medians(script):
    ours, theirs = results(script, others=(0.0, 0.01, 0.02))
    assert script.ratio_to_transformers(ours, [ours, theirs]) == pytest.approx(30 / 11)
    assert "NOT VALID" not in script.table([ours, theirs])


def test_one_round_on_a_busy_machine_leaves_no_ratio(script):
    ours, theirs = results(script, others=(0.0, 0.5, 0.0))
    assert script.ratio_to_transformers(ours, [ours, theirs]) is None
    assert script.table([ours, theirs]).count("NOT VALID") == 3


def test_a_rate_counts_output_tokens_or_prompt_tokens_when_it_is_prefill(script):
    assert script.Case(batch=8, prompt_len=128, output_len=64).rate(2.0) == 256
    assert script.Case(batch=1, prompt_len=512, output_len=1).rate(2.0) == 256


def test_a_measurement_has_its_time_and_a_share_of_others(script):
    before = script.machine_busy_s()
    measurement = script.measured(lambda prompts, length: sum(range(10**6)) * 0 + 1.0, [], 1)
    assert measurement.seconds == 1.0
    assert 0.0 <= measurement.others <= 1.5
    assert script.machine_busy_s() >= before
