"""Products with quantised weights compiled for devices not here: XLA's way, and a kernel."""

import pytest

from scripts.targets.weight_kernels import Product, figures_of

pytestmark = pytest.mark.slow

# Most cycles of the kernel, 5 % above what it took when this was written, and the least that XLA's
# own way takes: where that falls below, the kernel may have had its day.
BOUNDS = {
    ("v5e", "int4", 16): (144_000, 1_000_000),
}


def test_the_kernel_for_groups_takes_a_part_of_what_xla_takes():
    products = [
        Product(target=target, weight=weight, rows=rows, is_xla=is_xla)
        for target, weight, rows in BOUNDS
        for is_xla in (False, True)
    ]
    for product, figures in figures_of(products):
        most, least = BOUNDS[product.target, product.weight, product.rows]
        if product.is_xla:
            assert figures.cycles >= least
        else:
            assert 0 < figures.cycles <= most
            assert figures.num_dense == 0 and figures.temp_bytes < 2**20


def test_a_gpu_keeps_no_floats_of_a_matrix_in_memory():
    ways = [Product(target="a100", weight="int4", rows=16, is_xla=is_xla) for is_xla in (0, 1)]
    kernel, blocks = (figures for _, figures in figures_of(ways))
    assert kernel.way == "kernel" and kernel.temp_bytes < 2**20
    assert blocks.way == "XLA" and blocks.temp_bytes >= 16 * 2**20
