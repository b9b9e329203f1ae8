"""What `jaxserve plan` adds up and reads, without compilers of absent devices."""

from collections import Counter

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.abstract import abstract_engine
from jaxserve.planning.collectives import Collective, collectives_of
from jaxserve.planning.plan import Memory, Plan, decode_bound, prefill_bound
from jaxserve.planning.report import plan_lines
from jaxserve.planning.targets import TARGETS
from scripts.model_shapes import MODELS

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
    assert Collective("all-reduce", 800, 4, True).sent_bytes == 1200
    assert Collective("all-gather", 800, 4, True).sent_bytes == 600


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
