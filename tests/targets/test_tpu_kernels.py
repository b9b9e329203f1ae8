"""The TPU attention kernels compiled for TPUs that are not here: in place, and within bounds."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from scripts.targets.tpu_kernels import GRID, Figures, figures_of
from scripts.targets.tpu_schedule import heaviest, parse

BOUNDS = tomllib.loads((Path(__file__).parent / "kernel_bounds.toml").read_text())
CASES = {case.name: case for case in GRID}


@pytest.mark.slow
@pytest.mark.parametrize("target", BOUNDS)
def test_the_kernels_compile_in_place_and_within_their_bounds(target):
    faults = {}
    for case, figures in figures_of(target, [CASES[name] for name in BOUNDS[target]]):
        found = faults_of(figures, BOUNDS[target][case.name])
        if found:
            faults[case.name] = found
    assert not faults


def faults_of(figures, bounds):
    """Returns what a case must not have, in words."""
    counts = {"key": figures.decode_bundles, "pairs": figures.tile_bundles}
    return [
        *figures.faults,
        *(
            f"{counts[name]:.2f} bundles for {name}, at most {bound}"
            for name, bound in bounds.items()
            if figures.refusal is None and counts[name] > bound
        ),
    ]


@pytest.mark.slow
def test_what_the_hardware_cannot_hold_is_refused_before_it_is_compiled():
    case = dataclasses.replace(CASES["decode"], pages_per_sequence=100_000)
    ((_, figures),) = figures_of("v5e", [case])
    assert figures.refusal.startswith("ValueError: pages_per_sequence=100000")


def test_a_case_out_of_bounds_is_found():
    figures = Figures(cache_bytes=8, alias_bytes=4, cache_copies=1, decode_bundles=2.0)
    assert faults_of(figures, {"key": 1.5}) == [
        "4 of 8 cache bytes are in place",
        "1 copies of the cache",
        "2.00 bundles for key, at most 1.5",
    ]


BUNDLES = """\
     0   :  { %s0 = smov 1 }
   0x1 LB: > { %s1 = smov 1 }
   0x2 LB: >> { %0 = dma.hbm_to_vmem [thread:$0] }
   0x3   : > { %s1 = lost one mark }
   0x4   :  {} /* lost its marks */
   0x5   : >> { %s1 = smov 1 }
   0x6   : > { %s1 = smov 1 }
   0x7 LB: >> { %v1 = vmatmul }
   0x8   :  { %s1 = smov 1 }
"""
UNITS = "== CAPACTIY:\nMXU, VSTORE:SPILL\n 4 1\n== UTILIZATION:\n" + "".join(
    f"{uses} 0\n" for uses in (0, 0, 0, 0, 0, 0, 0, 3, 0)
)


def test_a_schedule_is_read_as_a_tree_of_loops():
    kernel = parse(BUNDLES, UNITS)
    (grid,) = kernel.inner
    copy, product = grid.inner
    assert (kernel.bundles, grid.bundles, copy.bundles, product.bundles) == (1, 4, 2, 2)
    assert copy.has_copy and not product.has_copy
    assert heaviest(kernel) is product and product.uses == {"MXU": 3, "VSTORE:SPILL": 0}
