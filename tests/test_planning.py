"""What `jaxserve plan` adds up and reads, without compilers of absent devices."""

import dataclasses
from collections import Counter

import jax
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.abstract import abstract_engine
from jaxserve.errors import ConfigError
from jaxserve.models.checkpoint import WeightFormat
from jaxserve.ops.quantization import Quantized
from jaxserve.options import PlanOptions
from jaxserve.planning.collectives import Collective, collectives_of
from jaxserve.planning.plan import (
    Memory,
    Plan,
    alternatives,
    decode_bound,
    estimates,
    prefill_bound,
)
from jaxserve.planning.report import plan_lines, recommend_lines, run_plan
from jaxserve.planning.targets import TARGETS
from scripts.model_shapes import MODELS
from tests.checkpoints import write_json

GIB = 2**30

HLO = """\
HloModule jit_bound

%branch.1 (parameter: (f32[8])) -> f32[32] {
  %all-gather.3 = f32[32]{0} all-gather(%x), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}
}

%called.4 (parameter: bf16[256,4096]) -> bf16[256,4096] {
  ROOT %psum.0 = bf16[256,4096]{1,0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%r
}

ENTRY %main (param: bf16[8,16]) -> bf16[8,16] {
  %chosen = f32[32]{0} conditional(%p, %q, %q), branch_computations={%branch.1, %branch.1}
  %begun = ((bf16[256,4096]{1,0}), bf16[256,4096]{1,0}) call-start(%z), to_apply=%called.4
  %psum.1 = bf16[256,4096]{1,0:T(8,128)} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%r
  %psum.2 = bf16[256,4096]{1,0} all-reduce(%b), replica_groups=[4,2]<=[8], to_apply=%r
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%c), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
}
"""


def test_collectives_are_read_from_hlo():
    assert collectives_of(HLO) == Counter(
        {
            Collective("all-gather", 128, 4, False): 1,
            Collective("all-reduce", 256 * 4096 * 2, 2, True): 3,
            Collective("all-gather", 128, 4, True): 1,
        }
    )


@pytest.mark.parametrize(
    ("line", "kind", "num_bytes"),
    [
        # Combined: one exchange of several arrays.
        ("(bf16[8,16]{1,0:T(8,128)(2,1)}, f32[4]{0}) all-reduce(%a, %b)", "all-reduce", 272),
        ("(bf16[8]{0}, /*index=1*/bf16[8]{0}) all-reduce-start(%a, %b)", "all-reduce", 32),
        (
            "((f32[8]{0}, s4[8]{0}), (f32[32]{0}, s4[32]{0})) all-gather-start(%a, %b)",
            "all-gather",
            128 + 16,
        ),
        ("(f32[8,2]{1,0}, f32[4,2]{1,0}) reduce-scatter-start(%a)", "reduce-scatter", 32),
        (
            "(bf16[8]{0}, bf16[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a)",
            "collective-permute",
            16,
        ),
        ("s4[5]{0:E(4)} all-gather(%a)", "all-gather", 3),  # two share a byte
        ("pred[16]{0} all-gather(%a)", "all-gather", 16),
        ("f8e4m3fn[2,3]{1,0} all-to-all(%a)", "all-to-all", 6),
        ("f32[] all-reduce(%a)", "all-reduce", 4),
    ],
)
def test_an_exchange_counts_all_its_results_and_only_those(line, kind, num_bytes):
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %x = {line}, replica_groups=[4,2]<=[8]\n}}\n"
    assert collectives_of(text) == Counter({Collective(kind, num_bytes, 2, True): 1})


def plan_of(model, mesh, num_pages=1000, collectives=(), **options):
    config = EngineConfig(model=model, mesh=mesh, max_model_len=8192, dtype="bfloat16", **options)
    engine = abstract_engine(config, MODELS[model])
    memory = Memory(limit=GIB, weights=engine.model.device_bytes, cache=0, slots=0, temporaries=0)
    return Plan(
        engine=engine,
        device="v5e",
        memory=memory,
        num_pages=num_pages,
        num_tokens=2048,
        collectives=Counter(collectives),
        refusal=None,
    )


def test_one_sequence_is_bound_by_reading_the_weights():
    plan, target = plan_of("llama-3.1-8b", "1"), TARGETS["v5e"]
    bound = decode_bound(plan, 1, 1024)
    embedding = 128256 * 4096 * 2  # is not read whole
    cache = 1024 * 2 * 8 * 128 * 32 * 2
    read = plan.engine.model.device_bytes - embedding + cache
    assert bound.memory == pytest.approx(read / target.memory_rate, rel=1e-6)
    assert bound.links == 0 and bound.seconds == bound.memory > bound.compute


def test_a_prefill_is_bound_by_its_products():
    plan = plan_of("llama-3.1-8b", "1")
    bound = prefill_bound(plan)
    weights = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336)
    attention = 32 * 2048 * 2048 / 2 * 2 * 32 * 128
    flops = 2 * (weights * 2048 + 128256 * 4096 + attention)
    assert bound.compute == pytest.approx(flops / 197e12, rel=1e-6)
    assert bound.seconds == bound.compute


def test_weights_of_8_bits_speed_up_only_products_in_8_bits():
    def seconds(plan):
        return prefill_bound(plan).compute

    plan, dense = (plan_of("llama-3.1-8b", "1", quantization=type) for type in ("int8", "auto"))
    assert seconds(plan) == pytest.approx(seconds(dense))  # they become bfloat16 to be multiplied
    parameters = [
        dataclasses.replace(
            parameter, value=dataclasses.replace(parameter.value, form=Quantized(is_static=False))
        )
        if parameter.name.endswith(".up_proj.weight")
        else parameter
        for parameter in plan.engine.model.parameters
    ]
    model = dataclasses.replace(plan.engine.model, parameters=tuple(parameters))
    faster = dataclasses.replace(plan, engine=dataclasses.replace(plan.engine, model=model))
    saved = 2 * 32 * 2048 * 4096 * 14336 / 394e12  # half of what it took in bfloat16
    assert seconds(dense) - seconds(faster) == pytest.approx(saved, rel=1e-6)


def test_devices_that_share_a_rank_share_its_work_and_wait_for_the_sums():
    alone, shared = (decode_bound(plan_of("llama-3.1-8b", mesh), 64, 4096) for mesh in ("1", "4"))
    # Norms are whole on each device: a little more than a quarter.
    assert shared.memory == pytest.approx(alone.memory / 4, rel=1e-3)
    assert shared.compute == pytest.approx(alone.compute / 4, rel=1e-3)
    # Sums behind attention and feed-forward of 32 layers and behind the embedding; float32 on CPU.
    assert shared.links == pytest.approx(2 * 3 / 4 * 65 * 64 * 4096 * 4 / 200e9)


def test_windows_are_counted_as_long_as_they_are():
    plan = plan_of("gemma-3-27b", "1")
    short, long = (decode_bound(plan, 1, length).memory for length in (1024, 8192))
    layers_that_see_all = 10  # of 62, each sixth
    page_bytes = plan.engine.settings.page_bytes / plan.engine.settings.limits.page_size
    extra = (8192 - 1024) * page_bytes * layers_that_see_all / 62
    assert long - short == pytest.approx(extra / 819e9, rel=1e-6)


def test_sequences_are_those_that_pages_and_slots_hold():
    plan = plan_of("smollm2-135m", "2x1", num_pages=1000, max_num_seqs=16)
    page_size = plan.engine.settings.limits.page_size
    assert plan.cache_tokens == 2 * 1000 * page_size
    assert plan.num_sequences(100 * page_size) == 2 * 10
    assert plan.num_sequences(page_size) == 2 * 16


def test_a_report_says_what_is_sent_and_what_is_needed():
    sums = {Collective("all-reduce", 2 * 2**20, 2, True): 61}
    lines = list(plan_lines(plan_of("smollm2-135m", "4x1", collectives=sums)))
    assert lines[0].endswith("on 4 v5e, mesh 4x1 (data x tensor): fits")
    assert any(line.split() == ["weights", "0.25"] for line in lines)
    assert "    61 all-reduce of 2.00 MiB among 2 devices" in lines


SMALL = MODELS["smollm2-135m"] | {"num_hidden_layers": 2}
CONFIG = EngineConfig(model="small", max_model_len=1024, dtype="bfloat16")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def cpus(device, count):
    """Returns CPU devices that stand for another kind; there are eight."""
    if count > 8:
        raise ConfigError(f"device {device!r} is known up to 8, not {count}")
    return jax.devices()[:count]


def only_h100(device, count):
    if device != "h100":
        raise ConfigError(f"device {device!r} needs its compiler")
    return cpus(device, count)


def plan_here(tmp_path, capsys, hf_config, *, recommend=False, **options):
    """Runs `jaxserve plan` with CPU devices; returns the exit status and the lines."""
    write_json(tmp_path / "config.json", hf_config)
    config = dataclasses.replace(CONFIG, model=str(tmp_path), **options)
    options = PlanOptions(device="v5e", recommend=recommend)
    status = run_plan(config, options, find_devices=cpus)
    return status, capsys.readouterr().out.splitlines()


def test_a_plan_of_a_folder_is_printed_and_its_status_says_that_it_fits(tmp_path, capsys):
    hf_config = SMALL | {"num_hidden_layers": 1, "vocab_size": 512}
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 64}
    status, lines = plan_here(tmp_path, capsys, hf_config, mesh="2x1", **sizes)
    assert status == 0
    assert lines[0].endswith("on 2 v5e, mesh 2x1 (data x tensor): fits")
    assert any(line.startswith("  largest step, 64 tokens") for line in lines)


def test_a_plan_that_does_not_fit_says_what_would_of_what_is_stored(tmp_path, capsys, monkeypatch):
    def refused(config, hf_config, device, *, formats, find_devices):
        [plan] = estimates(config, hf_config, device, find_devices(device, 1), formats=formats)
        return dataclasses.replace(plan, refusal="it is too hot")

    monkeypatch.setattr("jaxserve.planning.report.plan_for", refused)
    hf_config = SMALL | {"quantization_config": AWQ}
    status, lines = plan_here(tmp_path, capsys, hf_config)
    assert status == 1
    assert lines[0].endswith("does not fit: it is too hot")
    assert "(quantised: int4)" in lines[1]
    assert lines[-2:] == ["it would fit with:", "  --mesh 1x1"]  # no type: it has one


def test_a_type_is_refused_for_what_is_stored_quantised(tmp_path, capsys):
    hf_config = SMALL | {"quantization_config": AWQ}
    status, lines = plan_here(tmp_path, capsys, hf_config, quantization="int8", recommend=True)
    assert status == 0
    refusal = "quantization is 'int8'; the checkpoint is quantised already, to int4: "
    assert lines[2:] == [f"{device:7} {refusal}leave the option out" for device in TARGETS]


def test_what_does_not_fit_is_told_the_fewest_devices_and_the_types():
    config = dataclasses.replace(CONFIG, model="8b", max_num_seqs=8)
    found = list(alternatives(config, MODELS["llama-3.1-8b"], "v5e", find_devices=cpus))
    assert found == ["--mesh 1x1 --quantization int8", "--mesh 1x1 --quantization int4"]


def test_no_type_is_offered_for_what_is_stored_quantised():
    config = dataclasses.replace(CONFIG, model="8b", max_num_seqs=8, gpu_memory_utilization=0.5)
    stored = WeightFormat(type="int8")
    found = alternatives(config, MODELS["llama-3.1-8b"], "v5e", formats=stored, find_devices=cpus)
    assert list(found) == ["--mesh 1x4"]


def test_a_recommendation_goes_on_where_a_compiler_is_missing():
    lines = list(recommend_lines(CONFIG, SMALL, find_devices=only_h100))[2:]
    missing = [f"{device:7} device {device!r} needs its compiler" for device in TARGETS]
    assert [line for line in lines if "needs its compiler" in line] == [
        line for line in missing if not line.startswith("h100")
    ]
    found = [line.split()[:3] for line in lines if line.startswith("h100")]
    # Nine heads: of so many devices, each is a rank.
    assert found == [["h100", f"{count}", f"{count}x1"] for count in (1, 2, 4, 8)]


def test_a_recommendation_says_where_no_number_of_devices_will_do():
    lines = list(
        recommend_lines(dataclasses.replace(CONFIG, mesh="20x1"), SMALL, find_devices=cpus)
    )
    assert "v5e     device 'v5e' is known up to 8, not 32" in lines  # the first that is enough
    assert "h100    device 'h100' is known up to 8, not 20" in lines
    too_long = dataclasses.replace(CONFIG, max_model_len=9000)
    lines = list(recommend_lines(too_long, SMALL, find_devices=only_h100))
    assert "h100    max_model_len is 9000; the model has 8192 positions" in lines


def test_experts_are_tried_on_every_mesh_with_the_rows_of_their_pairs():
    experts, dense = (
        estimates(CONFIG, MODELS[model] | {"num_hidden_layers": 1}, "v5e", cpus("v5e", 4))
        for model in ("qwen3-30b-a3b", "qwen3-32b")
    )
    shapes = [str(plan.engine.shape) for plan in experts]
    assert shapes == ["1x4", "1x2x2", "1x4x1", "2x2", "2x2x1", "4x1"]
    assert [str(plan.engine.shape) for plan in dense] == ["1x4", "2x2", "4x1"]
    pairs = 512 * 8  # of a CPU's largest step
    assert all(plan.memory.temporaries > pairs * 2048 * 2 * 4 for plan in experts)
    lines = list(plan_lines(experts[1]))
    assert "mesh 1x2x2 (data x expert x tensor)" in lines[0]
    assert lines[1].endswith("attention reference, experts reference")
