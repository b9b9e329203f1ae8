"""The TPU kernel for grouped products in Pallas's TPU interpreter against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import tpu
from tests.kernels.grouped_rows import CASES, dense_products, grouped_rows


def multiply(lhs, rhs, sizes, scale=None, **options):
    interpret = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True)
    options = {"out_dtype": jnp.float32, "block_rows": 16, "interpret": interpret, **options}
    run = jax.jit(functools.partial(tpu.grouped_matmul, **options))
    return np.asarray(run(jnp.asarray(lhs), jnp.asarray(rhs), jnp.asarray(sizes), scale))


@pytest.mark.parametrize("case", CASES)
def test_each_row_meets_its_groups_matrix(case):
    lhs, rhs, sizes = grouped_rows(*CASES[case])
    out = multiply(lhs, rhs, sizes)
    np.testing.assert_allclose(out, dense_products(lhs, rhs, sizes), rtol=1e-5, atol=1e-5)


def test_a_matrix_may_be_visited_in_parts(monkeypatch):
    monkeypatch.setattr(tpu, "_MATRIX_BYTES", 128 * 32 * 4)
    lhs, rhs, sizes = grouped_rows(*CASES["rows past the last group"], out_size=384)
    out = multiply(lhs, rhs, sizes)
    np.testing.assert_allclose(out, dense_products(lhs, rhs, sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_scaled_matrices_are_what_their_numbers_stand_for(dtype):
    lhs, rhs, sizes = grouped_rows(*CASES["all rows in groups"])
    lhs = np.asarray(jnp.asarray(lhs, jnp.bfloat16))
    stored = jnp.asarray(rhs * 2).astype(dtype)
    scale = np.random.default_rng(1).random(rhs.shape[:2], np.float32)
    out = multiply(lhs, stored, sizes, jnp.asarray(scale))
    dense = np.asarray(stored.astype(jnp.float32)) * scale[:, :, None]
    np.testing.assert_allclose(out, dense_products(lhs, dense, sizes), rtol=1e-5, atol=1e-5)


def test_bfloat16_in_and_out():
    lhs, rhs, sizes = grouped_rows(*CASES["many groups"])
    lhs, rhs = (np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (lhs, rhs))
    out = multiply(lhs, rhs, sizes, out_dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    expected = dense_products(lhs, rhs, sizes)
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_visits_cover_each_groups_rows_and_every_tile(case):
    sizes, rows = CASES[case]
    arrays = tpu._visits(jnp.array(sizes, jnp.int32), rows, 16)
    group, tile, bounds, (used, total) = (np.asarray(array) for array in arrays)
    seen = {(int(g), int(t)) for g, t in zip(group[:used], tile[:used], strict=True)}
    assert len(seen) == used
    needed = {(g, row // 16) for g in range(len(sizes)) for row in range(bounds[g], bounds[g + 1])}
    assert seen == needed
    assert set(tile[:total]) == set(range(-(-rows // 16)))
    assert (np.diff(tile) >= 0).all()  # a tile's visits follow each other
    assert (group[total:] == group[total - 1]).all() and (tile[total:] == tile[total - 1]).all()


@pytest.mark.parametrize(
    ("out_size", "in_size", "block"), [(768, 2048, 768), (14336, 4096, 512), (96, 2048, 96)]
)
def test_matrices_are_divided_by_what_vmem_holds(out_size, in_size, block):
    assert tpu._block_out(out_size, in_size * 2) == block


def test_what_vmem_cannot_hold_is_refused():
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in ((8, 120000), (1, 136, 120000))]
    with pytest.raises(ValueError, match=r"a tile of 32 rows .* VMEM; there are"):
        tpu.grouped_matmul(*arrays, jnp.array([8], jnp.int32), None, out_dtype=jnp.float32)
