"""Counts what the TPU compiler's schedule of a Pallas kernel takes, without a TPU.

A TPU core issues one bundle of instructions a cycle, unless it waits for memory. The compiler
writes its final schedule when `dump_flags` are in LIBTPU_INIT_ARGS before jax is imported; `read`
turns one kernel's into loops with their bundles. Regions under a condition count as always run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2}:?\s*)*)\s*:\s*(>*)\s*\{")
_VMEM = re.compile(r"space=vmem, size = (0x[0-9a-f]+), offset = (0x[0-9a-f]+|0)")


@dataclass(kw_only=True)
class Loop:
    """A loop of a schedule (the outermost is the kernel), without what its inner loops take."""

    depth: int
    bundles: int = 0
    uses: dict[str, int] = field(default_factory=dict)  # instructions of each unit
    has_copy: bool = False  # it starts copies between HBM and VMEM
    inner: list[Loop] = field(default_factory=list)

    def walk(self) -> Iterator[Loop]:
        """Yields this loop and all inside it."""
        yield self
        for loop in self.inner:
            yield from loop.walk()


def dump_flags(folder: Path) -> str:
    """Returns what LIBTPU_INIT_ARGS must hold for the compiler to write schedules to `folder`."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def read(folder: Path, kernel: str) -> Loop:
    """Returns the newest dumped schedule of the Pallas kernel of this name."""
    bundles = _newest(folder, rf"\d+-{kernel}(\.[\w.]+)?-\d+-final_bundles\.txt")
    units = _newest(
        folder, rf"\d+-{kernel}(\.[\w.]+)?-\d+-final_hlo-static-per-bundle-utilization\.txt"
    )
    return parse(bundles.read_text(errors="replace"), units.read_text())


def vmem_bytes(folder: Path, kernel: str) -> int:
    """Returns what the kernel of this name takes of VMEM, registers that do not fit included."""
    text = _newest(folder, rf"\d+-{kernel}(\.[\w.]+)?-\d+-post-delay-converter\.txt").read_text()
    places = _VMEM.findall(text)
    return max(int(size, 16) + int(offset, 16) for size, offset in places)


def _newest(folder: Path, pattern: str) -> Path:
    found = [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]
    if not found:
        raise FileNotFoundError(f"no file like {pattern} in {folder}")
    return max(found, key=lambda path: int(path.name.split("-")[0]))


def parse(
    bundles: str,  # a `final_bundles` file
    utilization: str,  # a `final_hlo-static-per-bundle-utilization` file: a line for each bundle
) -> Loop:
    """Returns the kernel as a tree of loops."""
    header, _, table = utilization.partition("== UTILIZATION:\n")
    units = [name.strip() for name in header.splitlines()[1].split(",")]
    uses = [[int(number) for number in line.split()] for line in table.splitlines() if line]
    stack = [Loop(depth=0)]
    lines = (line for line in bundles.splitlines() if _BUNDLE.match(line))
    for line, used in zip(lines, uses, strict=True):
        tags, marks = _BUNDLE.match(line).groups()
        depth = len(marks) or stack[-1].depth  # some lines lose their marks
        while depth < stack[-1].depth or ("LB" in tags and depth == stack[-1].depth):
            stack.pop()
        if depth > stack[-1].depth:
            if "LB" in tags or not stack[-1].inner:
                stack[-1].inner.append(Loop(depth=depth))
            stack.append(stack[-1].inner[-1])  # without LB: a line before had lost a mark
        loop = stack[-1]
        loop.bundles += 1
        loop.has_copy |= "dma.hbm_to_vmem" in line
        for unit, count in zip(units, used, strict=True):
            loop.uses[unit] = loop.uses.get(unit, 0) + count
    return stack[0]


def heaviest(kernel: Loop) -> Loop:
    """Returns the loop that uses the matrix units most: the one over heads or blocks of keys."""
    return max(kernel.walk(), key=lambda loop: loop.uses.get("MXU", 0))
