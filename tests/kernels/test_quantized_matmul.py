"""Products with weights quantised by groups: reference and interpreted kernel, against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_matmul import quantized_matmul, reference, refusal, tpu, triton

IN = 512


def weight_of(dtype, groups, *, has_zero, out=256, in_=IN):
    """Returns data, scales, zeros in eighths of a level, and what they stand for."""
    random = np.random.default_rng(0)
    levels = random.integers(-8, 8, (out, in_)).astype(np.float32)
    # Scales of very different sizes: a group that takes another's is far off.
    scale = np.exp(random.uniform(-4, 0, (groups, out))).astype(np.float32)
    zero = random.integers(-64, 64, (groups, out)).astype(np.int8) if has_zero else None
    shifted = levels.reshape(out, groups, -1).astype(np.float64)
    if has_zero:
        shifted = shifted - zero.T[:, :, None] / 8
    dense = (shifted * scale.T[:, :, None]).reshape(out, in_)
    data = jnp.asarray(levels).astype(dtype)
    return data, jnp.asarray(scale), None if zero is None else jnp.asarray(zero), dense


def check(multiply, rows, dtype, groups, has_zero, **shape):
    data, scale, zero, dense = weight_of(dtype, groups, has_zero=has_zero, **shape)
    x = np.random.default_rng(1).standard_normal((rows, data.shape[1]), np.float32)
    x = jnp.asarray(x, jnp.bfloat16)
    out = multiply(x, data, scale, zero, zero_steps=8, out_dtype=jnp.float32)
    assert out.shape == (rows, data.shape[0])
    exact = np.asarray(x, np.float64)
    bound = 2**-7 * np.abs(exact) @ np.abs(dense).T  # of a rounding of each weight to bfloat16
    assert (np.abs(np.asarray(out) - exact @ dense.T) <= 0.5 * bound).all()


CASES = {
    "int4 with zeros": (jnp.int4, 16, True),
    "int8": (jnp.int8, 8, False),
    "float8": (jnp.float8_e4m3fn, 8, False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_what_the_numbers_stand_for(name):
    check(jax.jit(reference.quantized_matmul, static_argnames=STATIC), 5, *small(name))


STATIC = ("zero_steps", "out_dtype")


def small(name):
    dtype, groups, has_zero = CASES[name]
    return dtype, groups, has_zero


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [3, 300])
def test_the_kernel_is_what_the_numbers_stand_for(name, rows):
    dtype, groups, has_zero = small(name)
    shape = {"in_": 8 * 128} if groups == 8 else {"in_": IN}
    options = {"interpret": pltpu.InterpretParams(dma_execution_mode="on_wait")}
    multiply = jax.jit(functools.partial(tpu.quantized_matmul, **options), static_argnames=STATIC)
    check(multiply, rows, dtype, groups, has_zero, **shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [3, 80])
def test_the_triton_kernel_is_what_the_numbers_stand_for(name, rows):
    dtype, groups, has_zero = small(name)
    multiply = functools.partial(triton.quantized_matmul, interpret=True)
    multiply = jax.jit(multiply, static_argnames=STATIC)
    check(multiply, rows, dtype, groups, has_zero, in_=1024 if groups == 8 else IN)


@pytest.mark.parametrize(
    ("out", "in_", "groups", "reason"),
    [
        (14336, 4096, 128, None),
        (4096, 1792, 56, None),  # a part of eight of 14,336 columns
        (4096, 4096, 32, None),
        (4096, 1792, 14, "14 groups of 128 columns"),
        (4096, 4096, 16, "groups of 256 columns"),
        (96, 4096, 128, "96 rows"),
        (8192, 28672, 896, "bytes of VMEM"),
    ],
)
def test_what_the_kernel_cannot_multiply_is_refused(out, in_, groups, reason):
    sizes = {"out_size": out, "in_size": in_, "groups": groups}
    actual = refusal("tpu", jnp.dtype(jnp.int8), **sizes)
    assert actual is None if reason is None else reason in actual
    if reason is None:
        assert refusal("triton", jnp.dtype(jnp.int8), **sizes) is None
    else:
        arrays = (jnp.zeros((2, in_)), jnp.zeros((out, in_), jnp.int8), jnp.zeros((groups, out)))
        with pytest.raises(ValueError, match=reason):
            quantized_matmul(*arrays, backend="tpu")


def test_shapes_that_disagree_are_refused():
    x, data, scale = jnp.zeros((2, 64)), jnp.zeros((8, 64), jnp.int8), jnp.zeros((3, 8))
    with pytest.raises(ValueError, match=r"scale.shape=\(3, 8\) does not go with"):
        quantized_matmul(x, data, scale, backend="reference")
    with pytest.raises(ValueError, match=r"x.shape=\(2, 32\) does not go with"):
        quantized_matmul(x[:, :32], data, scale[:2], backend="reference")
    with pytest.raises(ValueError, match=r"zero.shape=\(1, 8\) must be \(2, 8\)"):
        zero = jnp.zeros((1, 8), jnp.int8)
        quantized_matmul(x, data, scale[:2], zero, backend="reference")
