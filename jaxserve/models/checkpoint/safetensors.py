"""Reads a Hugging Face folder: config.json and safetensors, whole or in shards, by slice.

Format: https://huggingface.co/docs/safetensors. Headers are parsed here so that every error names
its file and tensor, and so that a slice is read without mapping the whole file into memory.

Host only: imports no jax.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import ml_dtypes
import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import Index
from jaxserve.models.checkpoint.files import (
    bounds_of,
    open_binary,
    parse_object,
    read_json,
    read_part,
)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100 * 2**20
MAX_DIMENSIONS = 8

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file."""

    path: Path
    file: BinaryIO
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file


class SafetensorsCheckpoint:
    """An opened model folder. See `Checkpoint`; the shards stay open until `close`."""

    def __init__(self, folder: Path, *, has_weights: bool = True) -> None:
        self._folder = folder
        self.config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._files: list[BinaryIO] = []
        try:
            self._tensors = self._open() if has_weights else {}
        except BaseException:
            self.close()
            raise
        self.names = tuple(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the shards; `read` must not be called after."""
        for file in self._files:
            file.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole tensor."""
        return self._stored(name).shape

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns the tensor, or the part that `index` names, in its stored type."""
        stored = self._stored(name)
        where = f"{stored.path}: tensor {name!r}"
        bounds = bounds_of(index, stored.shape)
        return read_part(stored.file, stored.offset, stored.shape, stored.dtype, bounds, where)

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise WeightError(f"{self._folder}: has no tensor {name!r}")
        return self._tensors[name]

    def _open(self) -> dict[str, StoredTensor]:
        single, index = self._folder / SINGLE_FILE, self._folder / INDEX_FILE
        if single.is_file():
            return self._open_shard(single)
        if not index.is_file():
            raise WeightError(
                f"{self._folder}: has neither {SINGLE_FILE} nor {INDEX_FILE} "
                "(pickled weights are never read)"
            )
        listed = read_index(index)
        tensors: dict[str, StoredTensor] = {}
        for shard in sorted(set(listed.values())):
            path = self._folder / shard
            if not path.is_file():
                raise WeightError(f"{path}: shard is missing, but {INDEX_FILE} lists it")
            for name, stored in self._open_shard(path).items():
                if listed.get(name) != shard:
                    raise WeightError(
                        f"{path}: holds tensor {name!r}, which {INDEX_FILE} "
                        f"{'lists in ' + listed[name] if name in listed else 'does not list'}"
                    )
                tensors[name] = stored
        for name, shard in listed.items():
            if name not in tensors:
                raise WeightError(
                    f"{self._folder / shard}: tensor {name!r} is missing, "
                    f"but {INDEX_FILE} lists it there"
                )
        return tensors

    def _open_shard(self, path: Path) -> dict[str, StoredTensor]:
        file, size = open_binary(path)
        self._files.append(file)
        return read_header(file, size, path)


def read_index(path: Path) -> dict[str, str]:
    """Returns tensor name -> shard file name, from model.safetensors.index.json."""
    listed = read_json(path, unique=True).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise WeightError(f"{path}: weight_map is missing or empty")
    for name, shard in listed.items():
        # A shard lies beside its index: anything else could name any file of the machine.
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            raise WeightError(f"{path}: tensor {name!r}: {shard!r} is not a file name")
    return listed


def read_header(file: BinaryIO, size: int, path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of an opened safetensors file of `size` bytes, or `WeightError`."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise WeightError(f"{path}: truncated: {size} bytes, too short for a header")
    length = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES or length > size - 8:
        raise WeightError(f"{path}: truncated or corrupt: header of {length} bytes, file of {size}")
    try:
        text = file.read(length).decode()
    except UnicodeDecodeError as error:
        raise WeightError(f"{path}: header is not UTF-8") from error
    header = parse_object(text, f"{path}: header", unique=True)
    header.pop("__metadata__", None)
    tensors = {}
    spans = []
    for name, entry in header.items():
        where = f"{path}: tensor {name!r}"
        begin, end, dtype, shape = _checked(entry, where)
        spans.append((begin, end, where))
        tensors[name] = StoredTensor(
            path=path, file=file, dtype=dtype, shape=shape, offset=8 + length + begin
        )
    _check_spans(sorted(spans), size - 8 - length, path)
    return tensors


def _checked(entry: Any, where: str) -> tuple[int, int, np.dtype[Any], tuple[int, ...]]:
    # Returns begin, end (from the end of the header), type and shape of a header entry.
    if not isinstance(entry, dict):
        raise WeightError(f"{where}: header entry is not an object")
    name: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    if not isinstance(name, str) or name not in DTYPES:
        raise WeightError(f"{where}: type {name!r} cannot be read")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise WeightError(f"{where}: impossible shape {str(shape)[:80]}")
    if not _is_sizes(span) or len(span) != 2:
        raise WeightError(f"{where}: impossible data_offsets {str(span)[:80]}")
    num_bytes = math.prod(shape) * DTYPES[name].itemsize
    if span[1] - span[0] != num_bytes:
        raise WeightError(
            f"{where}: {name} {shape} needs {num_bytes} bytes, but data_offsets {span} hold "
            f"{span[1] - span[0]}"
        )
    return span[0], span[1], DTYPES[name], tuple(shape)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in value
    )


def _check_spans(spans: list[tuple[int, int, str]], size: int, path: Path) -> None:
    # The format allows neither holes nor overlaps nor bytes after the last tensor.
    end = 0
    for begin, stop, where in spans:
        if begin != end:
            raise WeightError(f"{where}: starts at byte {begin} of the data, expected {end}")
        if stop > size:
            raise WeightError(
                f"{where}: needs {stop} bytes of data, the file has {size}: truncated"
            )
        end = stop
    if end != size:
        raise WeightError(f"{path}: {size - end} bytes after the last tensor")
