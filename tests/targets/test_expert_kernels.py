"""The TPU kernel for grouped products compiled for TPUs that are not here, beside XLA's own."""

import pytest

from scripts.targets.expert_kernels import GRID, figures_of

CASES = {case.name: case for case in GRID}
# Most bundles that a case may take, all its visits: 5 % above what it took when this was written.
BOUNDS = {
    "v5e": {"up-64": 75_700, "up-512": 151_500, "up-int8": 197_800, "mixtral-up": 923_000},
    "v6e": {"up-64": 55_500, "up-512": 111_000, "up-f32": 1_067_000},
    "v5p": {"up-512": 154_000, "down-512": 155_600},
    "7x": {"up-512": 152_000, "up-e4m3": 109_000, "up-part": 27_800},
}


@pytest.mark.slow
@pytest.mark.parametrize("target", BOUNDS)
def test_the_kernel_compiles_within_its_bounds_and_copies_no_matrix(target):
    bounds = BOUNDS[target]
    found = dict(figures_of(target, [CASES[name] for name in bounds]))
    for case, figures in found.items():
        assert figures.refusal is None, case.name
        assert figures.temp_bytes < 2**20, case.name  # the smallest matrices take 48 MiB
        assert 0 < figures.bundles <= bounds[case.name], case.name


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_it_takes_no_more_than_xlas_kernel(target):
    names = ["up-512", "up-512-xla", "mixtral-up", "mixtral-up-xla"]
    found = {case.name: figures for case, figures in figures_of(target, map(CASES.get, names))}
    for name in names[::2]:
        assert found[name].bundles < 1.05 * found[f"{name}-xla"].bundles
