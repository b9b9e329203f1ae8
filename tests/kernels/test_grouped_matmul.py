"""Grouped matrix products against numpy in float64: the reference, and the contract's refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul, reference
from tests.kernels.grouped_rows import CASES, dense_products, grouped_rows


def multiply(lhs, rhs, sizes, scale=None, **options):
    run = jax.jit(lambda *arrays: grouped_matmul(*arrays, backend="reference", **options))
    return np.asarray(run(lhs, rhs, sizes, scale), np.float64)


@pytest.mark.parametrize("case", CASES)
def test_each_row_meets_its_groups_matrix(case):
    lhs, rhs, sizes = grouped_rows(*CASES[case])
    np.testing.assert_allclose(
        multiply(lhs, rhs, sizes), dense_products(lhs, rhs, sizes), rtol=1e-5, atol=1e-5
    )


def test_bfloat16_matrices_are_multiplied_as_such():
    lhs, rhs, sizes = grouped_rows(*CASES["all rows in groups"])
    rounded_lhs, rounded = (
        np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (lhs, rhs)
    )
    out = multiply(lhs, jnp.asarray(rhs, jnp.bfloat16), sizes)
    expected = dense_products(rounded_lhs, rounded, sizes)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.int4])
def test_scaled_matrices_are_what_their_numbers_stand_for(dtype):
    lhs, rhs, sizes = grouped_rows(*CASES["rows past the last group"])
    stored = jnp.asarray(rhs * 2).astype(dtype)
    scale = np.random.default_rng(1).random(rhs.shape[:2], np.float32)
    out = multiply(lhs, stored, sizes, scale)
    dense = np.asarray(stored.astype(jnp.float32)) * scale[:, :, None]
    np.testing.assert_allclose(out, dense_products(lhs, dense, sizes), rtol=1e-5, atol=1e-5)


def test_a_row_comes_out_the_same_whatever_the_others_hold():
    lhs, rhs, sizes = grouped_rows([3, 5, 1, 7], 16, out_size=96, in_size=160)
    out = multiply(lhs, rhs, sizes)
    others = np.random.default_rng(2).standard_normal(lhs.shape, np.float32)
    for row in range(16):
        changed = np.where(np.arange(16)[:, None] == row, lhs, others)
        np.testing.assert_array_equal(multiply(changed, rhs, sizes)[row], out[row])


def test_results_have_the_type_asked_for():
    lhs, rhs, sizes = grouped_rows([2, 2], 4)
    out = grouped_matmul(lhs, rhs, sizes, backend="reference", out_dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("rows", "groups", "tile"), [(1, 8, 2), (8, 128, 2), (40, 8, 8), (512, 8, 64), (9000, 8, 64)]
)
def test_tiles_are_as_large_as_groups_are(rows, groups, tile):
    assert reference._tile_rows(rows, groups) == tile


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_the_stack_of_matrices_is_never_copied(dtype):
    lhs, rhs, sizes = grouped_rows([2] * 8, 16, out_size=64, in_size=32)
    scale = jnp.ones((8, 64)) if dtype == jnp.int8 else None
    run = jax.jit(lambda *arrays: grouped_matmul(*arrays, backend="reference"))
    program = run.lower(lhs, jnp.asarray(rhs, dtype), sizes, scale).compile().as_text()
    entry = program.partition("ENTRY")[2]
    assert set(re.findall(r"= \w+\[8,64,32\]\S* ([\w-]+)\(", entry)) == {"parameter"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lhs": np.ones((4, 7), np.float32)}, r"lhs.shape=\(4, 7\) must be"),
        ({"sizes": np.ones(3, np.int32)}, r"group_sizes.shape=\(3,\) must be \(2,\)"),
        ({"sizes": np.ones(2, np.float32)}, "must be int32"),
        ({"scale": np.ones((2, 3), np.float32)}, r"scale.shape=\(2, 3\) must be \(2, 48\)"),
        ({"rhs": np.ones((2, 48, 32), np.int8)}, "rhs of int8 needs scales"),
    ],
)
def test_shapes_that_disagree_are_refused(change, message):
    lhs, rhs, sizes = grouped_rows([2, 2], 4)
    arrays = {"lhs": lhs, "rhs": rhs, "sizes": sizes, "scale": None, **change}
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*arrays.values(), backend="reference")
