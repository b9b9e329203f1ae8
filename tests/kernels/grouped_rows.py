"""Rows sorted by group, and what their products are in float64."""

from __future__ import annotations

import numpy as np

# Sizes of groups and rows in all: none, one row, groups across tiles, empty ones, rows past the
# last, everything in one.
CASES = {
    "one row": ([0, 1, 0], 1),
    "no row of a group": ([0, 0, 0], 5),
    "all rows in groups": ([3, 5, 1, 7], 16),
    "rows past the last group": ([0, 4, 0, 0, 9, 2], 40),
    "a group of several tiles": ([1, 150, 0, 2], 160),
    "all in the last group": ([0, 0, 0, 70], 70),
    "many groups": ([2, 0, 1, 3, 0, 0, 1, 1, 0, 4, 0, 0, 9, 0, 1, 0], 30),
}


def grouped_rows(
    sizes: list[int], rows: int, *, out_size: int = 48, in_size: int = 32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [rows, in], [groups, out, in], [groups] i32
    """Returns random operands; rows past the last group are NaN."""
    random = np.random.default_rng(seed)
    lhs = random.standard_normal((rows, in_size), np.float32)
    lhs[sum(sizes) :] = np.nan
    rhs = random.standard_normal((len(sizes), out_size, in_size), np.float32)
    return lhs, rhs, np.array(sizes, np.int32)


def dense_products(
    lhs: np.ndarray,  # [rows, in]
    rhs: np.ndarray,  # [groups, out, in]
    sizes: np.ndarray,  # [groups] i32
) -> np.ndarray:  # [rows, out] f64
    """Returns each row's product with its group's matrix, zeros past the last group."""
    out = np.zeros((len(lhs), rhs.shape[1]))
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    for row, group in enumerate(group_of):
        out[row] = rhs[group].astype(np.float64) @ lhs[row].astype(np.float64)
    return out
