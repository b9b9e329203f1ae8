"""Reads parts of files and JSON documents, turning every way they can be broken into WeightError.

Host only: imports no jax.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import Index

MAX_JSON_BYTES = 256 * 2**20


def parse_object(text: str, where: str, *, unique: bool = False) -> dict[str, Any]:
    """Returns the JSON object in `text`; with `unique`, a repeated key is an error."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise WeightError(f"{where}: {twice!r} appears twice")
        return found

    try:
        document = json.loads(text, object_pairs_hook=once if unique else None)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise WeightError(f"{where}: expected a JSON object, got {type(document).__name__}")
    return document


def read_text(path: Path) -> str:
    """Returns the UTF-8 text of a file; unreadable, huge or badly encoded raises `WeightError`."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise WeightError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightError(f"{path}: cannot be read ({error})") from error


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Returns the JSON object stored in a file; with `unique`, a repeated key is an error."""
    return parse_object(read_text(path), str(path), unique=unique)


def open_binary(path: Path) -> tuple[BinaryIO, int]:
    """Opens a file for reading. Returns it and its size in bytes."""
    try:
        file = path.open("rb")
        return file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise WeightError(f"{path}: cannot be opened ({error})") from error


def bounds_of(index: Index | None, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Returns (start, stop) for each dimension."""
    if index is None:
        return [(0, size) for size in shape]
    assert len(index) == len(shape), f"{index=} does not fit {shape=}"
    bounds = []
    for part, size in zip(index, shape, strict=True):
        start, stop, step = part.indices(size)
        assert step == 1, f"{index=} has a step"
        bounds.append((start, max(start, stop)))
    return bounds


def read_part(
    file: BinaryIO,
    offset: int,  # of the tensor's first byte in the file
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    bounds: list[tuple[int, int]],
    where: str,
) -> np.ndarray:
    """Returns `tensor[bounds]` of a row-major tensor, reading no other byte of it.

    The file is read in runs: everything inside the last dimension that is cut is contiguous.
    """
    out = np.empty([stop - start for start, stop in bounds], dtype)
    if out.size == 0:
        return out
    cut = [axis for axis, size in enumerate(shape) if bounds[axis] != (0, size)]
    axis = cut[-1] if cut else 0
    inner = math.prod(shape[axis + 1 :])
    start, stop = bounds[axis] if shape else (0, 1)
    run = (stop - start) * inner * dtype.itemsize
    strides = [math.prod(shape[outer + 1 :]) for outer in range(axis)]
    target = memoryview(out.reshape(-1).view(np.uint8).data)
    position = 0
    for place in itertools.product(*(range(*bounds[outer]) for outer in range(axis))):
        first = sum(i * stride for i, stride in zip(place, strides, strict=True)) + start * inner
        _fill(file, offset + first * dtype.itemsize, target[position : position + run], where)
        position += run
    return out


def _fill(file: BinaryIO, offset: int, target: memoryview, where: str) -> None:
    # One pread returns at most 2 GiB, so large tensors take several.
    done = 0
    while done < len(target):
        count = os.preadv(file.fileno(), [target[done : done + 2**30]], offset + done)
        if count == 0:
            raise WeightError(f"{where}: the file became shorter while it was being read")
        done += count
