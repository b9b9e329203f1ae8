"""Quantised weights: every way to multiply them, against the floats they stand for."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops.linear import linear, matmul_f32
from jaxserve.ops.quantization import (
    Blocks,
    Fused,
    Kernel,
    Quantized,
    QuantizedWeight,
    dequantize,
    form_for,
    kernel_refusal,
    multiplies_natively,
    quantize,
    round_to,
)

OUT, IN = 80, 64
INT4, INT8, FLOAT8 = jnp.dtype(jnp.int4), jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)
X = np.random.default_rng(1).standard_normal((5, IN), np.float32)
DENSE = np.random.default_rng(0).standard_normal((OUT, IN), np.float32)


def weight_of(dtype, num_groups, **fields):
    data, scale, zero = jax.jit(quantize, static_argnums=(1, 2))(DENSE, dtype, num_groups)
    return QuantizedWeight(data=data, scale=scale, zero=zero, dtype="float32", **fields)


def in_row_blocks(form):
    """Returns a weight whose scales belong to 32 rows each: 80 rows make three, one cut short."""
    data = jnp.asarray(DENSE).astype(FLOAT8)
    scale = jnp.asarray([[0.5, 1.0, 2.0], [4.0, 0.25, 3.0]], jnp.float32)
    return QuantizedWeight(data=data, scale=scale, rows=32, dtype="float32", form=form)


KINDS = {
    "int8": lambda form: weight_of(INT8, 1, form=form),
    "float8": lambda form: weight_of(FLOAT8, 1, form=form),
    "int8 groups": lambda form: weight_of(INT8, 4, form=form),
    "int4 groups with zeros": lambda form: weight_of(INT4, 2, form=form),
    "int4 with zeros": lambda form: weight_of(INT4, 1, form=form),
    "float8 row blocks": in_row_blocks,
}


TPU_KERNEL = Kernel(backend="tpu", max_rows=None, otherwise=Fused())
GPU_KERNEL = Kernel(backend="triton", max_rows=256, otherwise=Blocks(num_rows=2048))


# The last stands for a kernel that has more rows than it takes.
@pytest.mark.parametrize(
    "form",
    [
        Fused(),
        Blocks(num_rows=32),
        Blocks(num_rows=256),
        Kernel(backend="triton", max_rows=0, otherwise=Blocks(num_rows=32)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_floats(kind, form):
    weight = KINDS[kind](form)
    expected = X @ np.asarray(dequantize(weight)).T
    actual = jax.jit(matmul_f32)(X, weight)
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    assert linear(jnp.asarray(X, jnp.bfloat16), weight).dtype == jnp.bfloat16


def test_dequantised_numbers_follow_the_formula():
    weight = in_row_blocks(Fused())
    data, scale = np.asarray(weight.data).astype(np.float32), np.asarray(weight.scale)
    for row, column in ((0, 0), (31, 31), (32, 32), (79, 63), (64, 0)):
        expected = data[row, column] * scale[column // 32, row // 32]
        assert dequantize(weight)[row, column] == expected


@pytest.mark.parametrize("form", [Fused(), Blocks(num_rows=32)], ids=str)
def test_columns_in_another_order_meet_their_own_inputs(form):
    order = np.random.default_rng(2).permutation(IN).astype(np.int32)
    weight = weight_of(INT8, 2, form=form, order=jnp.asarray(order))
    dense = np.empty((OUT, IN), np.float32)
    dense[:, order] = np.asarray(dequantize(weight))
    np.testing.assert_allclose(matmul_f32(jnp.asarray(X), weight), X @ dense.T, atol=2e-4)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
@pytest.mark.parametrize("is_static", [False, True])
def test_quantised_activations_cost_no_more_than_their_rounding(dtype, is_static):
    scale = jnp.float32(np.abs(X).max() / (127 if dtype == INT8 else 448))
    weight = weight_of(dtype, 1, form=Quantized(is_static=is_static), input_scale=scale)
    dense = np.asarray(dequantize(weight))
    error = np.abs(matmul_f32(jnp.asarray(X), weight) - X @ dense.T)
    # int8: half a step for each input; float8: a sixteenth of each input at most.
    step = np.full(X.shape, scale / 2) if dtype == INT8 else np.abs(X) / 16 + scale / 2
    assert (error <= step @ np.abs(dense).T).all()
    assert error.max() > 1e-3  # they were rounded


def test_a_row_of_zeros_stays_zero_in_quantised_activations():
    weight = weight_of(INT8, 1, form=Quantized(is_static=False))
    assert not np.asarray(matmul_f32(jnp.zeros((2, IN), jnp.float32), weight)).any()


@pytest.mark.parametrize(("dtype", "num_groups"), [(INT8, 1), (INT8, 4), (INT4, 2)])
def test_integers_are_the_nearest(dtype, num_groups):
    data, scale, zero = quantize(jnp.asarray(DENSE), dtype, num_groups)
    error = np.abs(dequantize(QuantizedWeight(data=data, scale=scale, zero=zero)) - DENSE)
    error = error.reshape(OUT, num_groups, -1) / np.asarray(scale).T[:, :, None]
    # int4 may cut off the ends of a group's range for the sake of all else.
    assert np.quantile(error, 1.0 if dtype == INT8 else 0.9) <= 0.5001


def test_int4_errs_less_than_without_narrowing():
    data, scale, zero = quantize(jnp.asarray(DENSE), INT4, 2)
    groups = DENSE.reshape(OUT, 2, -1)
    step = (groups.max(2, keepdims=True) - groups.min(2, keepdims=True)) / 15
    plain_zero = np.round(-groups.min(2, keepdims=True) / step)
    plain = (np.clip(np.round(groups / step) + plain_zero, 0, 15) - plain_zero) * step
    actual = dequantize(QuantizedWeight(data=data, scale=scale, zero=zero))
    assert np.square(actual - DENSE).sum() < 0.97 * np.square(plain - groups).sum()


def test_int4_keeps_16_levels_wherever_they_lie():
    random = np.random.default_rng(3)
    levels = random.integers(0, 16, (OUT, 2, 32)).astype(np.float32)
    levels[:, :, :2] = 0, 15
    step, bottom = random.uniform(0.01, 0.02, (2, OUT, 2, 1)).astype(np.float32)
    dense = ((levels - 7.5) * step - bottom).reshape(OUT, IN)
    data, scale, zero = quantize(jnp.asarray(dense), INT4, 2)
    actual = dequantize(QuantizedWeight(data=data, scale=scale, zero=zero))
    assert np.abs(actual - dense).max() < 0.02 / 15  # a zero's half step is a sixteenth of a level


def test_zeros_count_eighths_of_int4s_levels_and_whole_ones_of_int8s():
    for dtype, step in ((INT4, 1 / 8), (INT8, 1)):
        data = jnp.full((2, 4), 3).astype(dtype)
        zero = jnp.array([[5, -128], [0, 127]], jnp.int8)
        scale = jnp.array([[1.0, 2.0], [0.5, 1.0]], jnp.float32)
        actual = dequantize(QuantizedWeight(data=data, scale=scale, zero=zero))
        expected = [
            [3 - 5 * step] * 2 + [1.5] * 2,
            [2 * (3 + 128 * step)] * 2 + [3 - 127 * step] * 2,
        ]
        np.testing.assert_array_equal(actual, expected)


def test_float8_weights_keep_four_significant_bits():
    data, scale, zero = quantize(jnp.asarray(DENSE), FLOAT8, 1)
    actual = dequantize(QuantizedWeight(data=data, scale=scale, zero=zero))
    np.testing.assert_allclose(actual, DENSE, rtol=1 / 16, atol=1e-3)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8, INT4], ids=str)
def test_a_matrix_of_zeros_stays_zero(dtype):
    data, scale, zero = quantize(jnp.zeros((OUT, IN), jnp.float32), dtype, 2)
    assert not np.asarray(dequantize(QuantizedWeight(data=data, scale=scale, zero=zero))).any()


def test_what_is_too_large_saturates():
    x = jnp.array([1e6, -1e6, 2.5, 2.6], jnp.float32)
    assert round_to(x, jnp.int8).tolist() == [127, -127, 2, 3]
    assert round_to(x, jnp.float8_e4m3fn).astype(jnp.float32).tolist() == [448, -448, 2.5, 2.5]


def test_widths_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 32\).*\(80, 64\)"):
        matmul_f32(jnp.zeros((2, 32), jnp.float32), weight_of(INT8, 1))


@pytest.mark.parametrize(
    ("platform", "is_native", "activations", "num_groups", "form"),
    [
        ("cpu", False, "dynamic", 1, Blocks(num_rows=256)),
        ("cpu", False, "dynamic", 32, Blocks(num_rows=256)),
        ("tpu", True, "float", 1, Fused()),
        ("tpu", True, "float", 32, TPU_KERNEL),
        ("tpu", True, "dynamic", 1, Quantized(is_static=False)),
        ("tpu", False, "dynamic", 1, Fused()),
        ("gpu", True, "static", 1, Quantized(is_static=True)),
        ("gpu", True, "dynamic", 32, GPU_KERNEL),
    ],
)
def test_the_form_follows_the_device(platform, is_native, activations, num_groups, form):
    actual = form_for(
        platform,
        is_native=is_native,
        has_kernel=True,
        activations=activations,
        num_groups=num_groups,
        has_zero=False,
        in_size=4096,
    )
    assert actual == form


def test_groups_without_a_kernel_go_xlas_way():
    options = {"is_native": False, "has_kernel": False, "has_zero": True, "in_size": 4096}
    options |= {"activations": "float", "num_groups": 128}
    assert form_for("tpu", **options) == Fused()
    assert form_for("gpu", **options) == Blocks(num_rows=2048)


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "dtype", "expected"),
    [
        ("cpu", "cpu", None, INT4, False),
        ("tpu", "TPU v5 lite", None, INT4, True),
        ("tpu", "TPU v99", None, INT4, False),
        ("gpu", "NVIDIA A100", "8.0", INT4, True),
        ("gpu", "NVIDIA A100", "8.0", FLOAT8, False),
        ("gpu", "NVIDIA L4", "8.9", FLOAT8, True),
        ("gpu", "Tesla T4", "7.5", INT4, False),
        ("gpu", "MI300X", "gfx942", INT4, False),
    ],
)
def test_the_kernel_for_groups_is_where_the_device_can(platform, kind, capability, dtype, expected):
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    part = {"out_size": 4096, "in_size": 4096, "num_groups": 128}
    refusal = kernel_refusal(device, dtype, dense_dtype=jnp.dtype(jnp.bfloat16), **part)
    assert (refusal is None) == expected
    assert kernel_refusal(device, dtype, dense_dtype=jnp.dtype(jnp.float32), **part)
    part["num_groups"] = 16
    assert kernel_refusal(device, dtype, dense_dtype=jnp.dtype(jnp.bfloat16), **part)


def test_activations_stay_float_beside_zeros_and_int4():
    options = {
        "is_native": True,
        "has_kernel": True,
        "activations": "dynamic",
        "num_groups": 1,
        "in_size": 4096,
    }
    assert form_for("gpu", has_zero=True, **options) == Fused()
    for platform in ("gpu", "tpu"):
        device = SimpleNamespace(
            platform=platform, device_kind="TPU v6 lite", compute_capability="9.0"
        )
        assert not multiplies_natively(device, jnp.dtype(jnp.int4))
    amd = SimpleNamespace(platform="gpu", device_kind="MI300X", compute_capability="gfx942")
    assert not multiplies_natively(amd, jnp.dtype(jnp.int8))


def test_int4_keeps_a_group_far_from_zero():
    data, scale, zero = quantize(jnp.full((2, 64), 0.3, jnp.float32), INT4, 1)
    actual = dequantize(QuantizedWeight(data=data, scale=scale, zero=zero))
    np.testing.assert_allclose(actual, 0.3, rtol=0.01)


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "int8", "float8"),
    [
        ("cpu", "cpu", None, False, False),
        ("tpu", "TPU v5 lite", None, True, False),
        ("tpu", "TPU v6 lite", None, True, False),
        ("tpu", "TPU7x", None, False, True),
        ("gpu", "NVIDIA A100-SXM4-40GB", "8.0", True, False),
        ("gpu", "NVIDIA L4", "8.9", True, True),
        ("gpu", "NVIDIA H100 80GB HBM3", "9.0", True, True),
    ],
)
def test_devices_multiply_what_their_generation_does(platform, kind, capability, int8, float8):
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    actual = [multiplies_natively(device, dtype) for dtype in (INT8, FLOAT8)]
    assert actual == [int8, float8]
