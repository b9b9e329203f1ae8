"""The GPU kernels in Pallas' interpreters against dense attention; on a GPU, compiled.

Mosaic GPU's interpreter knows no wgmma as the kernels use it: products are `jnp.dot` there.
Everything else (copies, barriers, the ring, masks, splits, the merge) is the code that is compiled.
"""

import dataclasses
import faulthandler
import functools
import re
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import (
    gpu,
    gpu_decode,
    gpu_prefill,
    gpu_work,
    layout_for,
    triton,
)
from pallas_kernels.ragged_paged_attention.gpu_blocks import (
    Blocks,
    DecodeBlocks,
    PrefillBlocks,
    check_blocks,
)
from tests.kernels.ragged_batches import ragged_batch


class Mode(NamedTuple):
    """A backend, and whether its kernels are interpreted or compiled."""

    kernels: ModuleType
    interpret: bool


BACKENDS = {"gpu": gpu, "triton": triton}
MODES = [
    *(pytest.param(Mode(module, True), id=name) for name, module in BACKENDS.items()),
    *(
        pytest.param(Mode(module, False), id=f"{name}-compiled", marks=pytest.mark.gpu)
        for name, module in BACKENDS.items()
    ),
]
HANGS_AFTER_S = 300

# Splits of one block each, so that every merge has several parts.
SPLIT = Blocks(
    decode=DecodeBlocks(programs=16, min_split=1), prefill=PrefillBlocks(warpgroups=2, block_kv=64)
)
SPLIT_WIDE = dataclasses.replace(SPLIT, prefill=PrefillBlocks(warpgroups=1, block_kv=64))
MIXED = [(1, 1), (1, 130), (2, 2), (17, 33), (70, 200)]
DECODE = [(1, 1), (1, 15), (1, 64), (1, 65), (1, 300)]


@pytest.fixture(autouse=True)
def interpreter_guard(monkeypatch):
    """Ends the run if a simulated thread waits for ever for one that failed."""
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    compile_threads_once(monkeypatch)
    yield
    faulthandler.cancel_dump_traceback_later()


def compile_threads_once(monkeypatch):
    """Has jax 0.10 compile a simulated thread once, not for each program of the grid."""
    from jax._src.pallas.mosaic.interpret import thread_map

    if not hasattr(thread_map, "_run"):  # later versions do so themselves
        monkeypatch.setattr(thread_map, "_run_jaxpr", run_jaxpr)


def run_jaxpr(jaxpr, consts, *args):
    """Compiles and runs: the jitted function is always the same, so jax's caches hold it."""
    compiled = jax.jit(evaluate, static_argnums=0).trace(jaxpr, consts, *args).lower().compile()
    compiled(consts, *args)


def evaluate(jaxpr, consts, *args):
    jax.core.eval_jaxpr(jaxpr, consts, *args)


def run_case(lens, mode, *, scales=(None, None), blocks=SPLIT, attention=None, **options):
    """Returns (actual, expected) over real rows; `options` are of the batch."""
    attention = attention or {}
    dtype = jnp.dtype(options.pop("dtype", jnp.bfloat16))
    options = {"heads": 4, "kv_heads": 2, "head_dim": 32, "tokens": 128, "sequences": 8} | options
    is_narrow = dtype.itemsize == 1
    batch = ragged_batch(lens, dtype=jnp.bfloat16 if is_narrow else dtype, **options)
    if is_narrow:
        batch = quantized(batch, dtype, scales)
    sides = zip((batch.keys, batch.values), scales, strict=True)
    cache = tuple(jnp.asarray(codes(side, dtype, scale), dtype) for side, scale in sides)
    layout = layout_for(
        name_of(mode), page_size=cache[0].shape[1], kv_heads=cache[0].shape[2],
        head_dim=cache[0].shape[3], dtype=dtype,
    )  # fmt: skip
    shapes = layout.shapes(len(batch.keys))
    assert [(side.shape, side.dtype) for side in cache] == [(s.shape, s.dtype) for s in shapes]
    k_scale, v_scale = (None if scale is None else jnp.float32(scale) for scale in scales)
    attend = functools.partial(
        mode.kernels.attend, scale=0.25, k_scale=k_scale, v_scale=v_scale, blocks=blocks,
        interpret=mode.interpret, **attention,
    )  # fmt: skip
    arrays = jax.tree.map(jnp.asarray, (batch.q, batch.k, batch.v, cache, *batch.tables()))
    out, cache = jax.jit(attend, donate_argnums=3)(*arrays)
    for side, expected, scale in zip(cache, batch.cache_after(), scales, strict=True):
        actual = np.asarray(side).astype(np.float32)
        np.testing.assert_array_equal(actual, codes(expected, dtype, scale))
    return np.asarray(out)[: batch.num_rows], batch.expected(scale=0.25, **attention)


def name_of(mode):
    return next(name for name, module in BACKENDS.items() if module is mode.kernels)


def quantized(batch, dtype, scales):
    """Returns the batch with the numbers that scaled pages of `dtype` can hold."""
    return dataclasses.replace(
        batch,
        **{
            name: codes(getattr(batch, name), dtype, scale) * np.float32(scale)
            for name, scale in zip(("k", "keys", "v", "values"), np.repeat(scales, 2), strict=True)
        },
    )


def codes(x, dtype, scale):
    """Returns what pages of `dtype` hold for numbers, as float32; junk stays as bad as can be."""
    if scale is None:
        return x
    x = x / np.float32(scale)
    if dtype == jnp.int8:
        x = np.where(np.isnan(x), 127.0, np.rint(x))
    return x.astype(dtype).astype(np.float32)


def check(actual, expected):
    assert not np.isnan(actual).any()
    np.testing.assert_allclose(actual, expected, atol=0.03, rtol=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_mixed_batch_matches_dense_attention_among_junk(mode):
    check(*run_case(MIXED, mode))


@pytest.mark.parametrize("mode", MODES)
def test_decode_batch_matches_dense_attention_among_junk(mode):
    check(*run_case(DECODE, mode, tokens=8))


@pytest.mark.parametrize("mode", MODES)
def test_window_cap_and_sinks_match_dense_attention(mode):
    sinks = np.array([0.5, -1.0, 2.0], np.float32)
    rules = {"sliding_window": 70, "soft_cap": 2.0, "sinks": sinks}
    lens = [(1, 1), (1, 290), (70, 200)]
    check(*run_case(lens, mode, attention=rules, heads=3, kv_heads=1))


@pytest.mark.parametrize("mode", MODES)
def test_scaled_8_bit_pages_match_dense_attention(mode):
    scales = (0.5, 2.0)
    options = {"dtype": jnp.float8_e4m3fn, "scales": scales, "kv_heads": 1, "tokens": 32}
    check(*run_case([(1, 130), (17, 33)], mode, **options))


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_one_sequence_stays_in_it(mode):
    lens = [(1, 130), (1, 40), (9, 90), (20, 30)]
    batch = ragged_batch(lens, tokens=64, sequences=4, head_dim=32, dtype=jnp.bfloat16)
    values = batch.values.copy()
    for sequence in (0, 2):  # the first page of each: 0 times its NaN would spoil the others
        values[batch.page_table[sequence, 0], 3] = np.nan
    batch = dataclasses.replace(batch, values=values)
    out = attend(batch, jnp.bfloat16, mode)[0]
    first_rows = batch.cu_q_lens[:5]
    is_nan = np.isnan(out).any((1, 2))
    assert [is_nan[a:b].all() for a, b in zip(first_rows, first_rows[1:], strict=False)] == [
        True, False, True, False,
    ]  # fmt: skip
    expected = batch.expected(scale=0.25)
    check(out[: batch.num_rows][~is_nan[: batch.num_rows]], expected[~is_nan[: batch.num_rows]])


def attend(batch, dtype, mode):
    """Returns the result for a batch whose numbers are stored as they are."""
    cache = tuple(jnp.asarray(side, dtype) for side in (batch.keys, batch.values))
    arrays = jax.tree.map(jnp.asarray, (batch.q, batch.k, batch.v, cache, *batch.tables()))
    attend = functools.partial(
        mode.kernels.attend, scale=0.25, blocks=SPLIT, interpret=mode.interpret
    )
    out, cache = jax.jit(attend)(*arrays)
    return np.asarray(out), cache


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_decode_items_cover_each_block_once(window, programs):
    context = np.array([0, 1, 64, 65, 1000, 0, 300], np.int32)
    blocks = DecodeBlocks(programs=programs, min_split=2)
    items, first_item = gpu_work.decode_items(jnp.asarray(context), blocks, 1, window)
    first = np.maximum(context - (window or 10**6), 0)
    expected = [
        (index, block)
        for index, length in enumerate(context)
        for block in range(first[index] // 64, -(-length // 64))
    ]
    visited = [
        (index, block) for index, begin, end, _ in items.tolist() for block in range(begin, end)
    ]
    assert visited == expected
    real = [index for index, begin, end, _ in items.tolist() if begin < end]
    assert [real.count(index) for index in range(len(context))] == np.diff(first_item).tolist()


def test_decode_splits_a_long_context_and_no_short_ones():
    blocks = DecodeBlocks(programs=264, min_split=4)

    def num_items(context):
        items, _ = gpu_work.decode_items(jnp.asarray(context, jnp.int32), blocks, 8, None)
        return [sum(row[0] == index for row in rows_of(items)) for index in range(len(context))]

    assert num_items([131072]) == [33]  # 264 programs for 8 kv heads
    assert num_items([200] * 64) == [1] * 64
    assert num_items([200] * 63 + [131072]) == [1] * 63 + [30]


def rows_of(items):
    return [row for row in items.tolist() if row[1] < row[2]]


def test_prefill_items_cover_each_token_once_and_the_longest_contexts_come_first():
    kv_lens, q_lens = np.array([7, 9, 100, 65, 0]), np.array([1, 1, 100, 33, 0])
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)])
    arrays = (jnp.asarray(array, jnp.int32) for array in (kv_lens, cu_q_lens, [2, 4]))
    items = gpu_work.prefill_items(*arrays, 160, 32).tolist()
    real = [row for row in items if row[2] > 0]
    assert len(real) == 6 and all(row[2] <= 0 for row in items[6:])
    rows = sorted(row for _, first, count, _ in real for row in range(first, first + count))
    assert rows == list(range(2, 135))
    for sequence, first, count, position in real:
        assert position - (first - cu_q_lens[sequence]) == kv_lens[sequence] - q_lens[sequence]
        assert 0 < count <= 32
    assert [row[3] for row in real] == [64, 32, 96, 64, 32, 0]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"dtype": "float32"}, "KV dtype float32"),
        ({"page_size": 24}, "page_size=24"),
        ({"page_size": 4}, "page_size=4"),
        ({"head_dim": 72}, "head_dim=72"),
        ({"head_dim": 512}, "head_dim=512"),
    ],
)
def test_pages_that_the_kernels_cannot_read_are_refused(shape, message):
    shape = {"page_size": 16, "head_dim": 128, "dtype": "bfloat16"} | shape
    shape["dtype"] = jnp.dtype(shape["dtype"])
    with pytest.raises(ValueError, match=message):
        layout_for("gpu", kv_heads=8, **shape).shapes(4)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (Blocks(decode=DecodeBlocks(stages=8)), "bytes of shared memory; the limit is 232448"),
        (Blocks(prefill=PrefillBlocks(block_kv=96)), "multiple of 64"),
        (Blocks(prefill=PrefillBlocks(warpgroups=3)), "warpgroups among"),
        (Blocks(prefill=PrefillBlocks(block_kv=256, stages=1)), "registers of a thread"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        check_blocks(blocks, 128, jnp.dtype(jnp.bfloat16))


def card(capability):
    return SimpleNamespace(compute_capability=capability, device_kind="a card")


def test_devices_without_the_matrix_instruction_are_told_why():
    assert gpu.device_refusal(card("9.0")) is None
    for capability in ("8.9", "10.0"):
        assert capability in gpu.device_refusal(card(capability))


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ("8.0", "bfloat16", None),
        ("8.6", "int8", None),
        ("8.6", "float8_e5m2", None),
        ("8.9", "float8_e4m3fn", None),
        ("10.0", "float8_e4m3fn", None),
        ("8.6", "float8_e4m3fn", "take compute capability 8.9 .* this is 8.6"),
        ("7.5", "float16", "8.0 .Ampere.; this is 7.5"),
        ("gfx942", "bfloat16", "NVIDIA GPUs, not for a card"),
    ],
)
def test_triton_serves_cards_from_ampere_on(capability, dtype, reason):
    refusal = triton.device_refusal(card(capability), jnp.dtype(dtype))
    assert refusal is None if reason is None else re.search(reason, refusal)


def test_where_jax_has_no_triton_any_more_the_kernels_say_so():
    code = (
        "import sys; sys.modules['jax.experimental.pallas.triton'] = None\n"
        "from types import SimpleNamespace\n"
        "import jax.numpy as jnp\n"
        "from jaxserve.ops.attention import LayerShape, choose_backend\n"
        "device = SimpleNamespace(platform='gpu', device_kind='A100', compute_capability='8.0')\n"
        "shape = LayerShape(heads=4, kv_heads=2, head_dim=64, page_size=16,\n"
        "    kv_dtype=jnp.dtype('bfloat16'), tokens=8, sequences=8, pages_per_sequence=4)\n"
        "choice = choose_backend('auto', device, shape)\n"
        "print(choice.backend, choice.warning)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("reference attention runs on the slower reference")
    assert "has no Triton lowering any more" in done.stdout


WIDE = {
    "three-heads-of-64": {"head_dim": 64, "heads": 9, "kv_heads": 3},
    "multi-query-of-80": {"head_dim": 80, "heads": 8},
    "own-heads-of-96": {"head_dim": 96, "heads": 2, "kv_heads": 2},
    "four-heads-of-128": {"head_dim": 128, "heads": 8, "kv_heads": 2},
    "four-heads-of-256": {"head_dim": 256, "blocks": SPLIT_WIDE},
    "71-heads-of-one-kv-head": {"head_dim": 16, "heads": 71},
    **{f"pages-of-{size}": {"page_size": size} for size in (8, 32, 128, 256)},
    **{
        f"decode-pages-of-{size}": {"lens": DECODE, "tokens": 8, "page_size": size}
        for size in (8, 64, 256)
    },
    **{f"window-{width}": {"attention": {"sliding_window": width}} for width in (1, 16, 64, 129)},
    "float16": {"dtype": jnp.float16},
    "float8_e5m2": {"dtype": jnp.float8_e5m2, "scales": (0.5, 2.0)},
    "int8-of-128": {"dtype": jnp.int8, "scales": (0.03, 0.02), "head_dim": 128},
    # Several blocks for each place in the ring, and contexts that end on its borders.
    "ring-wraps": {
        "lens": [(1, 1024), (1, 449), (128, 640), (65, 385)],
        "tokens": 256,
        "blocks": Blocks(),
    },
    "64-sequences": {
        "lens": [(1, 1 + 5 * index) for index in range(64)],
        "tokens": 64,
        "sequences": 64,
    },
    "tile-borders": {"lens": [(64, 64), (63, 127), (33, 96), (2, 129)], "tokens": 256, "heads": 2},
    "one-decode": {"lens": [(1, 77)], "tokens": 1, "sequences": 1},
    "one-prefill": {"lens": [(100, 100)], "sequences": 1, "junk": 8192.0},
}


# What only the kernels that gather keys by row take.
ANY_SHAPE = {
    "pages-of-24": {"page_size": 24, "head_dim": 72},
    "pages-of-2": {"page_size": 2, "head_dim": 24, "lens": DECODE, "tokens": 8},
}
# Interpreted, the other shapes are the same code, with other numbers.
INTERPRETED = {
    "triton": (
        *ANY_SHAPE,
        "multi-query-of-80",
        "four-heads-of-256",
        "71-heads-of-one-kv-head",
        "int8-of-128",
        "float8_e5m2",
    ),
    "gpu": tuple(WIDE),
}
CASES = [
    pytest.param(name, mode.values[0], id=f"{name}-{mode.id}", marks=mode.marks)
    for mode in MODES
    for name in (*WIDE, *ANY_SHAPE)
    if name in INTERPRETED[name_of(mode.values[0])]
    or (name in WIDE and not mode.values[0].interpret)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_shape_matches_dense_attention(name, mode):
    case = {"lens": MIXED, "kv_heads": 1, **(WIDE | ANY_SHAPE)[name]}
    case["pages_per_sequence"] = 1024 // case.get("page_size", 16) + 1
    check(*run_case(case.pop("lens"), mode, **case))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8], ids=str)
def test_no_thread_reads_shared_memory_that_another_still_writes(dtype, monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    for kernel in (gpu_decode, gpu_prefill):
        monkeypatch.setattr(kernel, "interpreter", lambda: InterpretGPUParams(detect_races=True))
    scales = (0.03, 0.02) if dtype == jnp.int8 else (None, None)
    decode = DecodeBlocks(programs=16, min_split=1)  # several parts to merge
    blocks = Blocks(decode=decode, prefill=PrefillBlocks(block_kv=64))
    options = {"dtype": dtype, "scales": scales, "blocks": blocks, "kv_heads": 1}
    check(*run_case([(1, 300), (40, 290)], Mode(gpu, True), sequences=2, **options))
    assert not gpu_callbacks.get_races().races_found
