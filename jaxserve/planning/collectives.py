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
    return Counter(_collectives(text))


def _collectives(text: str) -> Iterator[Collective]:
    is_entry = False
    for line in text.splitlines():
        if line and not line[0].isspace():  # a computation opens or closes
            is_entry = line.startswith("ENTRY")
        if (found := _OPERATION.search(line)) is None:
            continue
        sizes = [
            int(bits) // 8 * math.prod(int(size) for size in shape.split(",") if size)
            for _, bits, shape in _ARRAY.findall(found[1])
        ]
        yield Collective(found[2], max(sizes), _group_size(line), is_entry)


def _group_size(line: str) -> int:
    found = _GROUP.search(line)
    if found is None:
        return 1
    # {{0,1,2,3},{4,5,6,7}}, or [2,4]<=[8]: groups by their number and size.
    return len(found[1].split(",")) if found[1] else int(found[3])
