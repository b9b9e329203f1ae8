"""The device benchmarks: their bounds against counting, and one small run of each."""

import sys

import pytest

from scripts import bench_device, bench_kernels
from scripts.model_shapes import MODELS


def test_a_step_reads_every_weight_but_the_embedding():
    size = bench_device.model_size(MODELS["llama-3.1-8b"], weight_bytes=2, kv_bytes=2)
    vocab, hidden, layers = 128256, 4096, 32
    norms = (2 * layers + 1) * hidden
    assert size.step_bytes // 2 + vocab * hidden + norms == 8_030_261_248  # the model's size
    assert size.token_bytes == 128 * 2**10


def test_quantised_layers_are_read_as_they_are_stored():
    whole, part = (
        bench_device.model_size(MODELS["llama-3.1-8b"], 2, 2, quantization).step_bytes
        for quantization in ("auto", "int8")
    )
    assert whole - part == bench_device.model_size(MODELS["llama-3.1-8b"], 2, 2).layer_weights


def test_decode_is_bound_by_weights_and_contexts():
    size = bench_device.model_size(MODELS["llama-3.1-8b"], weight_bytes=2, kv_bytes=2)
    one = size.decode_bound(1, 0, bandwidth=3e12)
    assert one == pytest.approx(3e12 / size.step_bytes)
    assert size.decode_bound(64, 4096, bandwidth=3e12) == pytest.approx(
        64 / (size.step_bytes / 3e12 + 64 * 4096 * size.token_bytes / 3e12)
    )


def test_no_sequence_ends_while_others_are_prefilled_or_timed():
    # 256 prompts of 1024 tokens, 1792 a step beside the decodes: 147 steps, a token in each.
    assert bench_device.num_prefill_steps(256, 1024, 2048) == 147
    assert bench_device.num_new_tokens(256, 1024, 2048, num_steps=64) > 147 + 8 + 64


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 7), (4, 4), (3, 9)])
def test_work_counts_the_pairs_that_the_mask_leaves(q_len, kv_len):
    shape = bench_kernels.Shape(heads=4, kv_heads=2, head_dim=8, page_size=16, dtype="float32")
    work = bench_kernels.Work(sequences=3, q_len=q_len, kv_len=kv_len)
    pairs = sum(key <= kv_len - q_len + row for row in range(q_len) for key in range(kv_len))
    assert work.flops_of(shape) == 3 * pairs * 4 * 4 * 8
    assert work.bytes_of(shape) == 3 * kv_len * 2 * 2 * 8 * 4


def test_kernels_are_timed_and_a_refusal_is_a_line():
    shape = bench_kernels.Shape(heads=4, kv_heads=3, head_dim=16, page_size=16, dtype="float32")
    lines = list(bench_kernels.rows(["reference"], shape, 1, (1e9, 1e9)))
    assert len(lines) == len(bench_kernels.WORK)
    assert all("heads=4 must be a multiple of kv_heads=3" in line for line in lines)
    shape = bench_kernels.Shape(heads=4, kv_heads=2, head_dim=16, page_size=16, dtype="float32")
    work = bench_kernels.Work(sequences=2, q_len=1, kv_len=40)
    assert 0 < bench_kernels.time_of("reference", shape, work, num_loops=2) < 10


def test_products_are_timed_in_every_way_the_device_has(monkeypatch):
    monkeypatch.setattr(bench_kernels, "PRODUCT_ROWS", (2,))
    monkeypatch.setattr(bench_kernels, "_NUM_WEIGHTS", 1)
    lines = list(bench_kernels.product_lines(128, (1e9, 1e9)))
    assert len(lines) == 2 * len(bench_kernels.WEIGHTS) - 1
    assert sum("Blocks" in line for line in lines) == len(bench_kernels.WEIGHTS) - 1
    lines = list(bench_kernels.expert_lines(64, (1e9, 1e9)))
    assert ["reference" in line for line in lines] == [True, False]


@pytest.mark.slow
def test_the_engine_is_timed_with_random_weights(capsys, monkeypatch):
    model = "--model smollm2-135m --layers 1 --max-num-batched-tokens 64"
    work = "--batch 2 --context 40 --steps 4"
    monkeypatch.setattr(sys, "argv", ["bench_device.py", *model.split(), *work.split()])
    monkeypatch.setattr(bench_device, "measured_limits", lambda: (1e10, 1e11))
    assert bench_device.main() == 0
    lines = capsys.readouterr().out.splitlines()
    header, row = lines[-2:]
    assert header.split()[:4] == ["batch", "context", "prefill", "share"]
    assert row.split()[:2] == ["2", "40"] and float(row.split()[4]) > 0
