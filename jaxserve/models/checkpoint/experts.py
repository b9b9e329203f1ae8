"""Shows the matrices of experts, which folders store one by one, as the stacks that models have.

Host only: imports no jax.
"""

from __future__ import annotations

import re
from typing import Self

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import Checkpoint, Index
from jaxserve.models.checkpoint.files import bounds_of

_EXPERT = re.compile(r"(.+\.experts)\.(0|[1-9]\d*)\.([\w.]+)")
# Mixtral's own words for what others call as the models here do.
_RENAMED = {
    r"\.block_sparse_moe\.": ".mlp.",
    r"\.experts\.w1\.": ".experts.gate_proj.",
    r"\.experts\.w2\.": ".experts.down_proj.",
    r"\.experts\.w3\.": ".experts.up_proj.",
}


class ExpertCheckpoint:
    """An opened folder whose names hold experts. See `Checkpoint`.

    `X.experts.0.Y`, `X.experts.1.Y`, ... are one tensor `X.experts.Y` of one more dimension. All
    other tensors are as they were, but for Mixtral's words.
    """

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self.config = source.config
        self.generation_config = source.generation_config
        self._parts: dict[str, dict[int, str]] = {}
        self._whole: dict[str, str] = {}
        for name in source.names:
            if match := _EXPERT.fullmatch(name):
                stack = _renamed(f"{match[1]}.{match[3]}")
                self._parts.setdefault(stack, {})[int(match[2])] = name
            else:
                self._whole[_renamed(name)] = name
        self.names = (*self._whole, *self._parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; `read` must not be called after."""
        self._source.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole tensor; WeightError where experts are amiss."""
        if name not in self._parts:
            return self._source.shape(self._whole.get(name, name))
        parts = self._parts[name]
        if missing := [number for number in range(len(parts)) if number not in parts]:
            raise WeightError(
                f"{name}: the checkpoint has {len(parts)} experts, the last is {max(parts)}, "
                f"and expert {missing[0]} is missing"
            )
        shape = self._source.shape(parts[0])
        for part in parts.values():
            if self._source.shape(part) != shape:
                raise WeightError(
                    f"{part} has shape {self._source.shape(part)}; that of {parts[0]} is {shape}"
                )
        return (len(parts), *shape)

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns the tensor, or the part that `index` names; of a stack, only experts in it."""
        if name not in self._parts:
            return self._source.read(self._whole.get(name, name), index)
        (start, stop), *bounds = bounds_of(index, self.shape(name))
        assert start < stop, f"{index=} holds no expert"
        inside = tuple(slice(*pair) for pair in bounds)
        parts = self._parts[name]
        first = self._source.read(parts[start], inside)
        stack = np.empty((stop - start, *first.shape), first.dtype)
        stack[0] = first
        for number in range(start + 1, stop):
            stack[number - start] = self._source.read(parts[number], inside)
        return stack


def has_experts(checkpoint: Checkpoint) -> bool:
    """Returns whether a checkpoint stores experts one by one."""
    return any(map(_EXPERT.fullmatch, checkpoint.names))


def _renamed(name: str) -> str:
    for pattern, word in _RENAMED.items():
        name = re.sub(pattern, word, name)
    return name
