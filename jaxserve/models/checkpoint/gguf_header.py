"""Parses the header of a GGUF file: metadata and where each tensor lies, every field checked.

The `gguf` package reads the same, but on a damaged file it loops over counts taken from it, or
raises IndexError; here each count is held against the bytes left in the file before it is used.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Host only: imports no jax.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxserve.errors import ConfigError, WeightError

MAX_METADATA = 65_536
MAX_TENSORS = 1_048_576
MAX_NAME_BYTES = 65_535
MAX_STRING_BYTES = 64 * 2**20
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 2**20
MIN_TENSOR_INFO_BYTES = 8 + 4 + 8 + 4 + 8
MIN_METADATA_BYTES = 8 + 4 + 1

_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies. `shape` is row-major, so reversed against the file's own order."""

    name: str
    shape: tuple[int, ...]
    type: Any  # gguf.GGMLQuantizationType
    offset: int  # of the first byte, from the start of the file
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """The metadata and the tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def gguf_package() -> Any:
    """Returns the `gguf` package, imported on first use because it is an optional dependency."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ConfigError(
            "reading GGUF files needs the gguf package: pip install 'jaxserve[gguf]'"
        ) from error
    return gguf


def read_header(file: BinaryIO, size: int, path: Path) -> Header:
    """Returns the header of an opened GGUF file of `size` bytes, or raises `WeightError`."""
    reader = _Reader(file, size, path)
    magic = reader.take(4)
    if magic != b"GGUF":
        raise WeightError(f"{path}: not a GGUF file (starts with {magic!r})")
    version = reader.number("I")
    if version not in (2, 3):
        raise WeightError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
    num_tensors = reader.count("Q", "tensors", MAX_TENSORS, MIN_TENSOR_INFO_BYTES)
    num_metadata = reader.count("Q", "metadata entries", MAX_METADATA, MIN_METADATA_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(num_metadata):
        key = reader.string(MAX_NAME_BYTES)
        if key in metadata:
            raise WeightError(f"{path}: metadata {key!r} appears twice")
        reader.where = f"metadata {key!r}"
        metadata[key] = reader.value(reader.number("I"))
    infos = [_tensor_info(reader) for _ in range(num_tensors)]
    return Header(metadata=metadata, tensors=_placed(infos, metadata, reader))


class _Reader:
    # Reads forward through the header; every length is checked against the bytes left.

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.size, self.path = file, size, path
        self.where = "header"
        self.position = 0
        file.seek(0)

    def fail(self, what: str) -> WeightError:
        return WeightError(f"{self.path}: {self.where}: {what}, at byte {self.position}")

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise self.fail("truncated or corrupt: runs past the end of the file")
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail("the file became shorter while it was being read")
        self.position += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, code: str, what: str, limit: int, item_bytes: int) -> int:
        count: int = self.number(code)
        if count > limit or count * item_bytes > self.size - self.position:
            raise self.fail(f"truncated or corrupt: {count} {what}")
        return count

    def string(self, limit: int = MAX_STRING_BYTES) -> str:
        data = self.take(self.count("Q", "bytes in a string", limit, 1))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.fail("a string is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.number("I"))
        code = self.scalar_code(kind)
        value = self.number(code)
        # The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def array(self, kind: int) -> list[str] | np.ndarray:
        if kind == _STRING:
            return [self.string() for _ in range(self.count("Q", "strings", self.size, 8))]
        dtype = np.dtype("<u1" if kind == _BOOL else "<" + self.scalar_code(kind))
        count = self.count("Q", "array elements", self.size, dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def scalar_code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self.fail(f"unknown value type {kind}")
        return _SCALARS[kind]


def _tensor_info(reader: _Reader) -> TensorInfo:
    # `offset` is still relative to the start of the data here.
    constants = gguf_package()
    name = reader.string(MAX_NAME_BYTES)
    reader.where = f"tensor {name!r}"
    num_dimensions = reader.count("I", "dimensions", MAX_DIMENSIONS, 8)
    shape = tuple(reversed([reader.number("Q") for _ in range(num_dimensions)]))
    kind = reader.number("I")
    try:
        kind = constants.GGMLQuantizationType(kind)
        block, block_bytes = constants.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise reader.fail(f"unknown tensor type {kind}") from error
    if not shape or 0 in shape:
        raise reader.fail(f"impossible shape {shape}")
    if shape[-1] % block:
        raise reader.fail(f"rows of {shape[-1]} do not divide into {kind.name} blocks of {block}")
    num_bytes = math.prod(shape) // block * block_bytes
    return TensorInfo(
        name=name, shape=shape, type=kind, offset=reader.number("Q"), num_bytes=num_bytes
    )


def _placed(
    infos: list[TensorInfo], metadata: dict[str, Any], reader: _Reader
) -> dict[str, TensorInfo]:
    alignment = metadata.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 0 < alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise WeightError(f"{reader.path}: general.alignment {alignment!r} is not a power of two")
    base = -(-reader.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    end = base
    for info in sorted(infos, key=lambda info: info.offset):
        where = f"{reader.path}: tensor {info.name!r}"
        if info.name in tensors:
            raise WeightError(f"{where} appears twice")
        offset = base + info.offset
        if info.offset % alignment:
            raise WeightError(f"{where}: offset {info.offset} is not a multiple of {alignment}")
        if offset < end:
            raise WeightError(f"{where}: overlaps the tensor before it")
        end = offset + info.num_bytes
        if end > reader.size:
            raise WeightError(
                f"{where}: needs bytes up to {end}, but the file has {reader.size}: truncated"
            )
        tensors[info.name] = TensorInfo(
            name=info.name,
            shape=info.shape,
            type=info.type,
            offset=offset,
            num_bytes=info.num_bytes,
        )
    return tensors
