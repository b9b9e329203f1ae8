"""What `jaxserve plan` says of memory is what the compiler says, up to the edge of what fits."""

import dataclasses

import pytest

from jaxserve.config import EngineConfig
from jaxserve.planning.plan import plan_for
from scripts.compile_targets import MODELS, use_compilers

pytestmark = pytest.mark.slow

HF_CONFIG = MODELS["smollm2-135m"] | {"num_hidden_layers": 2}
CONFIG = EngineConfig(model="two layers", max_num_seqs=8, max_num_batched_tokens=64)


def compiled_bytes(plan):
    """Returns what the compiler says that the largest step needs on a device."""
    engine = plan.engine
    sizes = engine.lower(engine.buckets[-1], plan.num_pages).compile().memory_analysis()
    kept = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + kept


def test_memory_is_the_compilers_and_the_refusal_is_at_its_edge():
    use_compilers()
    # Slots at full length would need less than there is: ask for pages that fill the device.
    plan = plan_for(dataclasses.replace(CONFIG, num_pages=1000), HF_CONFIG, "v5e")
    assert plan.refusal is None
    page_bytes = plan.engine.settings.page_bytes
    room = plan.memory.limit - plan.memory.total
    fitting = plan.num_pages + int(0.99 * room) // page_bytes
    nearly_full = plan_for(dataclasses.replace(CONFIG, num_pages=fitting), HF_CONFIG, "v5e")
    assert nearly_full.refusal is None
    assert compiled_bytes(nearly_full) == pytest.approx(nearly_full.memory.total, rel=0.03)
    too_many = plan.num_pages + int(1.01 * room) // page_bytes
    refused = plan_for(dataclasses.replace(CONFIG, num_pages=too_many), HF_CONFIG, "v5e")
    assert refused.refusal is not None and "GiB are needed on each device" in refused.refusal
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        compiled_bytes(refused)
