"""The step with quantised weights and 8-bit caches, compiled for a TPU and an H100 not here."""

import pytest

from scripts.compile_targets import Case, compile_case, count_dense, use_compilers

pytestmark = pytest.mark.slow

# (target, quantization, kv_cache_dtype): MiB of two layers' weights, and how many matrices a step
# writes out as floats. A compiler reads int8 and float8 as they lie, and kernels do int4.
KEYS_AND_VALUES = 2 * 1024 * 4096  # 8 bit with int4 too
LAYER = 2 * 4096 * 4096 + KEYS_AND_VALUES + 3 * 14336 * 4096
ROWS = 2 * 4096 + 2 * 1024 + 2 * 14336 + 4096
NARROW = LAYER - KEYS_AND_VALUES
CASES = [
    ("v6e", "int8", "auto", 0),
    ("v6e", "int4", "auto", 0),
    ("h100", "int8", "fp8", 0),
    ("h100", "fp8", "auto", 0),
    ("h100", "int4", "auto", 0),
]
BYTES = {
    "int8": LAYER + 4 * ROWS,
    "fp8": LAYER + 4 * ROWS,
    "int4": NARROW / 2 + 5 * NARROW / 32 + KEYS_AND_VALUES + 4 * 2 * 1024,
}


@pytest.mark.parametrize(("target", "quantization", "kv_cache_dtype", "num_dense"), CASES)
def test_weights_are_read_as_they_are_stored(target, quantization, kv_cache_dtype, num_dense):
    use_compilers()
    case = Case(
        target=target,
        model="llama-3.1-8b",
        num_layers=2,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        max_num_seqs=32,  # sorting more rows for sampling takes the compiler most of its time
    )
    program = compile_case(case, "decode")
    assert program.faults == ()
    assert program.num_state_copies == 0
    assert program.num_dense_weights <= num_dense
    embeddings = 2 * 128256 * 4096 * 2
    expected = embeddings + 2 * BYTES[quantization] + program.state_bytes
    assert expected <= program.argument_bytes < 1.02 * expected


def test_a_matrix_written_out_as_floats_is_found():
    text = """
%fused_computation (p: s8[64,128]) -> bf16[64,128] {
  %p = s8[64,128]{1,0} parameter(0)
  ROOT %c = bf16[64,128]{1,0} convert(%p)
}
ENTRY %main (a: s8[64,128], b: bf16[64,128]) -> bf16[2,32,128] {
  %a = s8[64,128]{1,0} parameter(0)
  %b = bf16[64,128]{1,0} parameter(1)
  %other = bf16[128,64]{1,0} transpose(%b)
  ROOT %f = bf16[2,32,128]{2,1,0} fusion(%a), kind=kLoop, calls=%fused_computation
}
"""
    assert count_dense(text, [(64, 128)]) == 1
    assert count_dense(text, [(32, 128)]) == 0
