"""The TPU kernels in Pallas's TPU interpreter against dense attention in numpy.

The interpreter models copies, semaphores and memory that nobody has written (NaN), and finds
races; what it does not know (tiles, sizes of memories) `tests/targets` asks the compiler.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu
from pallas_kernels.targets import TPU
from tests.kernels.ragged_batches import ragged_batch

# Blocks so small that short contexts have several, and sequences share grid steps and tiles.
SMALL = dataclasses.replace(
    TPU, decode_block_numbers=1, decode_rows=4, tile_rows=64, tile_block_kv=128, tile_heads=1
)
ARRAYS = ("sinks", "k_scale", "v_scale")
MODES = ("on_wait", "eager")  # when the interpreter carries copies out: as late or early as can be
ONES = [(1, 1), (1, 16), (1, 17), (1, 270), (1, 128), (1, 129)]
MIXED = [(1, 1), (1, 17), (1, 150), (2, 2), (16, 16), (40, 140), (5, 133)]
MIXED_ROWS = {"tokens": 70, "sequences": 9}


def packed(keys, values, dtype):
    """Returns keys and values [pages, page_size, kv_heads, head_dim] as the kernels keep them."""
    head_dim = keys.shape[3]
    width = 64 if head_dim <= 64 else -(-head_dim // 128) * 128
    sides = [
        np.pad(side, ((0, 0), (0, 0), (0, 0), (0, width - head_dim))) for side in (keys, values)
    ]
    pages = np.concatenate(sides, 3)[:, :, :, None] if head_dim <= 64 else np.stack(sides, 3)
    return jnp.asarray(pages.transpose(0, 2, 3, 1, 4), dtype)


def stored(numbers, scale, dtype):
    """Returns what `dtype` makes of numbers over scale, as float32."""
    numbers = numbers / np.float32(scale)
    if jnp.issubdtype(dtype, jnp.integer):
        numbers = np.clip(np.rint(numbers), -128, 127)
    return np.asarray(numbers.astype(dtype), np.float32)


def attend(batch, cache, mode, **options):
    """Runs the kernels in the interpreter. Returns their results."""
    arrays = {name: options.pop(name) for name in list(options) if name in ARRAYS}
    interpret = pltpu.InterpretParams(dma_execution_mode=mode, detect_races=True)
    run = jax.jit(functools.partial(tpu.attend, scale=0.25, interpret=interpret, **options))
    operands = (batch.q, batch.k, batch.v, (cache,), *batch.tables())
    # Most of the time is the compiler's.
    compiled = run.lower(*operands, **arrays).compile({"xla_backend_optimization_level": 0})
    return compiled(*operands, **arrays)


def run_case(
    capfd, lens, *, mode="on_wait", dtype=jnp.float32, kv_dtype=None, scales=(1.0, 1.0),
    sinks=None, target=SMALL, atol=None, **options,
):  # fmt: skip
    """Asserts that rows and cache are as dense attention and numpy have them, without a race."""
    rules = {name: options.pop(name) for name in ("sliding_window", "soft_cap") if name in options}
    kv_dtype = kv_dtype or dtype
    batch = ragged_batch(lens, dtype=dtype, **options)
    if kv_dtype != dtype:
        names = dict(zip(("k", "keys", "v", "values"), np.repeat(scales, 2), strict=True))
        raw = {name: stored(getattr(batch, name), scale, kv_dtype) for name, scale in names.items()}
        held = dataclasses.replace(batch, **raw)
        seen = {name: raw[name] * np.float32(scale) for name, scale in names.items()}
        expected_batch = dataclasses.replace(batch, **seen)
    else:
        held = expected_batch = batch
    arrays = {name: jnp.asarray(getattr(batch, name), dtype) for name in ("q", "k", "v")}
    if sinks is not None:
        rules["sinks"] = jnp.asarray(sinks, jnp.float32)
    if kv_dtype != dtype:
        rules |= dict(zip(("k_scale", "v_scale"), map(jnp.float32, scales), strict=True))
    actual, (cache,) = attend(
        dataclasses.replace(batch, **arrays), packed(held.keys, held.values, kv_dtype), mode,
        target=target, **rules,
    )  # fmt: skip
    assert actual.dtype == dtype
    actual, cache = np.asarray(actual, np.float32), np.asarray(cache, np.float32)
    assert_no_complaint(capfd)
    rules = {name: rule for name, rule in rules.items() if not name.endswith("scale")}
    expected = expected_batch.expected(scale=0.25, **rules)
    atol = atol or (5e-5 if dtype == jnp.float32 else 0.04)
    np.testing.assert_allclose(actual[: batch.num_rows], expected, atol=atol)
    assert not actual[batch.num_rows :].any()
    after = np.asarray(packed(*held.cache_after(), kv_dtype), np.float32)
    np.testing.assert_array_equal(cache, after)


def assert_no_complaint(capfd):
    """Fails where the interpreter has reported races or semaphores that are not back at zero."""
    written = capfd.readouterr().out
    assert "RACE" not in written and "non-zero count" not in written, written


@pytest.mark.parametrize("mode", MODES)
def test_one_token_sequences_match_dense_attention(capfd, mode):
    run_case(capfd, ONES, mode=mode, tokens=9, sequences=9, head_dim=128)


@pytest.mark.parametrize("mode", MODES)
def test_mixed_batch_matches_dense_attention(capfd, mode):
    run_case(capfd, MIXED, mode=mode, head_dim=128, **MIXED_ROWS)


def test_packed_heads_in_a_window_with_cap_and_sinks_match_dense_attention(capfd):
    sinks = np.array([0.5, -1.0, 2.0, 0.0])
    run_case(capfd, MIXED, head_dim=64, sliding_window=40, soft_cap=2.0, sinks=sinks, **MIXED_ROWS)


def test_padded_heads_in_bfloat16_match_dense_attention(capfd):
    run_case(capfd, MIXED, head_dim=80, dtype=jnp.bfloat16, kv_heads=1, heads=8, **MIXED_ROWS)


@pytest.mark.parametrize("kv_dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_quantised_keys_and_values_match_dense_attention(capfd, kv_dtype):
    # int8 holds no NaN: its junk is what it saturates to.
    junk = 1e4 if kv_dtype == jnp.int8 else np.nan
    run_case(
        capfd, MIXED, dtype=jnp.bfloat16, kv_dtype=kv_dtype, scales=(2.0**-6, 2.0**-5), junk=junk,
        head_dim=128, page_size=32, **MIXED_ROWS,
    )  # fmt: skip


def test_int8_saturates(capfd):
    batch = ragged_batch([(1, 1)], tokens=1, sequences=1, head_dim=128, junk=0.0)
    batch = dataclasses.replace(batch, k=np.full_like(batch.k, 1e3), v=np.full_like(batch.v, -1e3))
    cache = jnp.zeros((2, 2, 2, 16, 128), jnp.int8)
    out, (cache,) = attend(batch, cache, "on_wait", v_scale=jnp.float32(0.5))
    assert_no_complaint(capfd)
    page = cache[batch.page_table[0, 0]]
    assert (page[:, 0, 0] == 127).all() and (page[:, 1, 0] == -128).all()
    np.testing.assert_allclose(out, -64.0)


def test_a_step_without_any_token_changes_nothing(capfd):
    batch = ragged_batch([(2, 3), (1, 1)], tokens=8, sequences=4, head_dim=128)
    batch = dataclasses.replace(
        batch, counts=np.zeros(2, np.int32), kv_lens=np.zeros(4, np.int32),
        cu_q_lens=np.zeros(5, np.int32),
    )  # fmt: skip
    before = packed(batch.keys, batch.values, jnp.float32)
    out, (cache,) = attend(batch, before, "on_wait")
    assert_no_complaint(capfd)
    np.testing.assert_array_equal(cache, before)
    assert not np.asarray(out).any()


def test_a_sequence_of_nans_leaves_the_others_alone(capfd):
    batch = ragged_batch(MIXED, head_dim=128, **MIXED_ROWS)
    clean, _ = attend(batch, packed(batch.keys, batch.values, jnp.float32), "on_wait", target=SMALL)
    keys, values = batch.keys.copy(), batch.values.copy()
    is_sick = np.zeros(len(clean), bool)
    for index in (2, 5):  # one of one token, one of several: all their keys and values
        pages = batch.page_table[index, : -(-batch.kv_lens[index] // 16)]
        keys[pages], values[pages] = np.nan, np.nan
        is_sick[batch.cu_q_lens[index] : batch.cu_q_lens[index + 1]] = True
    out, _ = attend(batch, packed(keys, values, jnp.float32), "on_wait", target=SMALL)
    assert_no_complaint(capfd)
    assert np.isnan(out[is_sick]).all()
    np.testing.assert_array_equal(out[~is_sick], clean[~is_sick])


def random_lens(random, num_ones, num_long, page_size):
    """Returns lengths that favour the borders of pages and blocks."""
    borders = np.array([1, page_size - 1, page_size, page_size + 1, 127, 128, 129, 256, 257])
    lens = [(1, int(random.choice([*borders, random.integers(1, 300)]))) for _ in range(num_ones)]
    for _ in range(num_long):
        q_len = int(random.choice([2, 3, page_size, page_size + 1, random.integers(2, 60)]))
        lens.append((q_len, q_len + int(random.choice([0, *borders, random.integers(0, 200)]))))
    return lens


GRID = [  # heads, kv_heads, head_dim, page_size, dtype, kv_dtype
    (4, 4, 64, 16, jnp.float32, None),
    (9, 3, 64, 64, jnp.bfloat16, None),
    (8, 1, 80, 32, jnp.float32, None),
    (4, 2, 96, 16, jnp.bfloat16, None),
    (8, 2, 128, 128, jnp.float32, None),
    (16, 1, 128, 256, jnp.bfloat16, None),
    (4, 2, 256, 64, jnp.float32, None),
    (4, 4, 256, 16, jnp.bfloat16, None),
    (8, 2, 64, 32, jnp.bfloat16, jnp.int8),
    (8, 2, 128, 16, jnp.bfloat16, jnp.float8_e5m2),
    (4, 2, 80, 64, jnp.float32, jnp.float8_e4m3fn),
    (6, 2, 256, 16, jnp.bfloat16, jnp.int8),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", range(len(GRID)))
def test_every_shape_matches_dense_attention_on_adversarial_batches(capfd, index, mode):
    heads, kv_heads, head_dim, page_size, dtype, kv_dtype = GRID[index]
    random = np.random.default_rng(index)
    options = dict(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype,
        kv_dtype=kv_dtype, mode=mode, junk=1e4 if kv_dtype == jnp.int8 else np.nan,
        sinks=random.standard_normal(heads), sliding_window=[None, 1, 33, 128][index % 4],
        soft_cap=[None, 3.0][index % 2],
        # Queries are rounded to bfloat16 for 8-bit keys, and probabilities for all but float32.
        atol=None if kv_dtype is None else 0.1,
    )  # fmt: skip
    if kv_dtype is not None:
        options["scales"] = (2.0**-6, 2.0**-5) if kv_dtype == jnp.int8 else (0.5, 2.0)
    lens = random_lens(random, num_ones=10, num_long=6, page_size=page_size)
    tokens = sum(q_len for q_len, _ in lens) + int(random.integers(0, 20))
    run_case(capfd, lens, tokens=tokens, sequences=18, **options)


@pytest.mark.slow
@pytest.mark.parametrize("num_ones", [1, 2, 63, 64])
def test_batches_of_1_to_64_sequences_match_dense_attention(capfd, num_ones):
    random = np.random.default_rng(num_ones)
    lens = random_lens(random, num_ones=num_ones, num_long=0, page_size=16)
    run_case(capfd, lens, tokens=64, sequences=64, head_dim=128, mode="eager")


@pytest.mark.slow
def test_the_blocks_of_real_targets_match_dense_attention(capfd):
    run_case(capfd, MIXED, head_dim=128, target=TPU, page_size=64, heads=16, **MIXED_ROWS)


def test_the_interpreter_reports_a_race_and_a_semaphore_that_is_not_at_zero(capfd):
    def read_too_early(x_ref, out_ref, scratch_ref, semaphore):
        copy = pltpu.make_async_copy(x_ref, scratch_ref, semaphore)
        copy.start()
        out_ref[...] = scratch_ref[...]
        copy.wait()

    def never_wait(x_ref, out_ref, scratch_ref, semaphore):
        pltpu.make_async_copy(x_ref, scratch_ref, semaphore).start()
        out_ref[...] = jnp.zeros_like(out_ref)

    assert "RACE" in complaint_about(read_too_early, capfd)
    assert "non-zero count" in complaint_about(never_wait, capfd)


def complaint_about(kernel, capfd):
    """Returns what the interpreter writes, or from jax 0.12 on raises, about a kernel."""
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA(())],
        interpret=pltpu.InterpretParams(dma_execution_mode="eager", detect_races=True),
    )
    try:
        jax.block_until_ready(call(jnp.ones((8, 128), jnp.float32)))
    except jax.errors.JaxRuntimeError as error:
        pltpu.reset_tpu_interpret_mode_state()
        return str(error)
    return capfd.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"page_size": 48}, "page_size=48 must be one of"),
        ({"head_dim": 512}, "head_dim=512 must be from 1 to 256"),
        ({"dtype": jnp.float16}, "pages of float16 cannot be kept"),
    ],
)
def test_pages_that_cannot_be_kept_are_refused(sizes, message):
    sizes = {"page_size": 64, "kv_heads": 2, "head_dim": 128, "dtype": jnp.bfloat16} | sizes
    with pytest.raises(ValueError, match=message):
        tpu.page_shapes(4, **sizes)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "pages_per_sequence", "message"),
    [(8, 8, 60_000, "use larger pages"), (512, 256, 64, "shard the heads over more devices")],
)
def test_what_does_not_fit_is_refused_when_traced(heads, kv_heads, pages_per_sequence, message):
    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, new = (array(64, count, 128, dtype=jnp.bfloat16) for count in (heads, kv_heads))
    cache = tpu.page_shapes(9, page_size=64, kv_heads=kv_heads, head_dim=128, dtype=jnp.bfloat16)
    tables = array(8), array(8, pages_per_sequence), array(9), array(2)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *args: tpu.attend(*args, scale=1.0), q, new, new, cache, *tables)
