"""Reads from a compiled step what its devices send each other."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_OPERATION = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"([a-z]+)(\d+)\w*\[([\d,]*)\]")
_OPENED = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
# Conds name branch_computations, loops body and condition.
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\])")


class Collective(NamedTuple):
    """One exchange."""

    kind: str  # as HLO calls it
    num_bytes: int  # of the result on each device
    group_size: int  # devices that take part in each exchange
    is_always: bool  # False: inside a cond or a loop, when a step's sampling options ask for it

    @property
    def sent_bytes(self) -> float:
        """What each device sends when it goes round in a ring."""
        share = (self.group_size - 1) / self.group_size
        return (2 if self.kind == "all-reduce" else 1) * share * self.num_bytes


def collectives_of(
    text: str,  # of compiled HLO
) -> Counter[Collective]:
    """Returns how often a program holds each exchange."""
    computations, entry = _computations(text)
    always = _called(computations, entry)
    return Counter(
        collective
        for name, lines in computations.items()
        for collective in _collectives(lines, name in always)
    )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the one that a program begins in."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if opened := _OPENED.match(line):
            lines = computations.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        lines.append(line)
    return computations, entry


def _called(computations: dict[str, list[str]], entry: str) -> set[str]:
    """Returns the computations that every run passes: those of no cond and no loop."""
    found: set[str] = set()
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name in computations and name not in found:
            found.add(name)
            waiting += [called for line in computations[name] for called in _CALLED.findall(line)]
    return found


def _collectives(lines: list[str], is_always: bool) -> Iterator[Collective]:
    for line in lines:
        if (found := _OPERATION.search(line)) is None:
            continue
        sizes = [
            int(bits) // 8 * math.prod(int(size) for size in shape.split(",") if size)
            for _, bits, shape in _ARRAY.findall(found[1])
        ]
        yield Collective(found[2], max(sizes), _group_size(line), is_always)


def _group_size(line: str) -> int:
    found = _GROUP.search(line)
    if found is None:
        return 1
    # {{0,1,2,3},{4,5,6,7}}, or [2,4]<=[8]: groups by their number and size.
    return len(found[1].split(",")) if found[1] else int(found[3])
