"""Products with quantised weights compiled for devices not here: XLA's way, and a kernel."""

import pytest

from scripts.targets.weight_kernels import Product, figures_of

pytestmark = pytest.mark.slow

# Most cycles of the kernel, 5 % above what it took when this was written, and the least that XLA's
# own way takes: where that falls below, the kernel may have had its day.
BOUNDS = {
    ("v5e", "int4", 16): (138_000, 1_000_000),
    ("v6e", "fp8-blocks", 256): (330_000, 900_000),
}


def test_the_kernel_for_groups_takes_a_part_of_what_xla_takes():
    products = [
        Product(target=target, weight=weight, rows=rows, is_fused=is_fused)
        for target, weight, rows in BOUNDS
        for is_fused in (False, True)
    ]
    for product, figures in figures_of(products):
        most, least = BOUNDS[product.target, product.weight, product.rows]
        if product.is_fused:
            assert figures.cycles >= least
        else:
            assert 0 < figures.cycles <= most
            assert figures.num_dense == 0 and figures.temp_bytes < 2**20
