"""Reads from a compiled step what its devices send each other."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_OPERATION = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # pred has no number: 8 bits
_LAYOUT = re.compile(r"\{[^}]*\}")
_OPENED = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
# Conds name branch_computations, loops body and condition.
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[(\d+),(\d+)\])")


class Collective(NamedTuple):
    """One exchange."""

    kind: str  # as HLO calls it
    num_bytes: int  # of the results on each device
    group_size: int  # devices that take part in each exchange
    is_always: bool  # False: inside a cond or a loop, when a step's sampling options ask for it


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
        results, kind = _LAYOUT.sub("", found[1]), found[2]
        # What starts an exchange returns its operands, its results and perhaps more; that of an
        # all-reduce only results, which are as its operands.
        if found[3] and kind != "all-reduce" and len(members := _members(results)) > 1:
            results = members[1]
        yield Collective(kind, _num_bytes(results), _group_size(line), is_always)


def _members(
    type: str,  # "(bf16[8], (f32[2,4], f32[2]))", without layouts
) -> list[str]:
    """Returns the types in a tuple; none of one that is no tuple."""
    members, depth = [""], 0
    for letter in type:
        depth -= letter in ")]"
        if letter == "," and depth == 1:
            members.append("")
        elif depth:
            members[-1] += letter
        depth += letter in "(["
    return members if type.startswith("(") else []


def _num_bytes(type: str) -> int:
    """Returns the bytes of the arrays in a type, all together."""
    return sum(
        -(-int(bits or 8) * math.prod(int(size) for size in shape.split(",") if size) // 8)
        for bits, shape in _ARRAY.findall(type)
    )


def _group_size(line: str) -> int:
    found = _GROUP.search(line)
    if found is None:
        return 1
    # {{0,1,2,3},{4,5,6,7}}, or [2,4]<=[8]: groups by their number and size.
    return len(found[1].split(",")) if found[1] else int(found[3])
