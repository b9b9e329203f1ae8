"""The step program compiled for eight devices that are not here: what they send, and what not."""

import pytest

from jaxserve.mesh import parse_mesh
from scripts.compile_targets import MODELS, Case, compile_case, use_compilers

pytestmark = pytest.mark.slow

LAYERS = 2  # widths decide what a compiler meets


@pytest.mark.parametrize(
    ("target", "model", "mesh", "bucket", "quantization", "layer_kernels"),
    [
        ("v5e", "llama-3.1-8b", "2x4", "decode", "auto", 1),
        ("v5e", "llama-3.3-70b", "1x8", "mixed", "int8", 3),
        ("v6e", "qwen3-32b", "1x8", "decode", "auto", 1),
        ("v5p", "llama-3.3-70b", "2x4", "decode", "auto", 1),
        ("7x", "qwen3-32b", "4x2", "mixed", "auto", 3),
        ("h100", "llama-3.1-8b", "2x4", "decode", "auto", 2),
        ("v6e", "qwen3-30b-a3b", "1x4x2", "decode", "auto", 1 + 3),  # experts
        ("v5e", "qwen3-30b-a3b", "1x8x1", "decode", "int8", 1 + 3),
    ],
)
def test_devices_sum_twice_a_layer_and_exchange_nothing_else(
    target, model, mesh, bucket, quantization, layer_kernels
):
    use_compilers()
    case = Case(
        target=target,
        model=model,
        mesh=mesh,
        num_layers=LAYERS,
        quantization=quantization,
        max_num_seqs=32,  # sorting more rows for sampling takes the compiler most of its time
    )
    program = compile_case(case, bucket)
    assert program.faults == ()  # the cache is written in place
    assert program.num_state_copies == 0
    assert program.num_kernels == layer_kernels * LAYERS
    parts = parse_mesh(mesh).rank_devices
    always = [what for what in program.collectives.elements() if what.is_always]
    # Behind attention, behind the feed-forward or experts, and the embedding: none over data.
    sums = [what for what in always if what.kind == "all-reduce"]
    num_bytes = program.bucket[0] * MODELS[model]["hidden_size"] * 2  # bfloat16
    assert len(sums) == 2 * LAYERS + 1
    assert {(what.num_bytes, what.group_size) for what in sums} == {(num_bytes, parts)}
    assert always == sums
    # What sampling exchanges is small: never the logits.
    others = [what for what in program.collectives.elements() if not what.is_always]
    logits_bytes = program.bucket[1] * MODELS[model]["vocab_size"] * 4
    assert others and all(what.group_size == parts for what in others)
    assert all(what.num_bytes <= logits_bytes / 64 for what in others)
