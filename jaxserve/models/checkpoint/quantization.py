"""The schemes of already quantised checkpoints: what config.json says, and how parts are packed.

Host only: imports no jax.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import ZERO_STEPS, StoredWeight, WeightFormat

SUPPORTED = (
    "compressed-tensors (int8, fp8, packed 4 and 8 bit), fp8 (per tensor, or blocks of 128 x 128), "
    "awq (4 bit, gemm), gptq (4 and 8 bit)"
)
# AutoAWQ's "gemm" order: the i-th four bits of a word are those of column _AWQ_ORDER[i].
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Source(Protocol):
    """The tensors as the files hold them."""

    names: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor."""


class Scheme(Protocol):
    """How one method stores a matrix: `stem.marker` exists for each that is quantised."""

    @property
    def marker(self) -> str:
        """The part that only quantised matrices have."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part that belongs to a quantised matrix."""

    @property
    def format(self) -> WeightFormat:
        """What `load` returns."""

    def shape(self, source: Source, stem: str) -> tuple[int, int]:
        """Returns `[out, in]`."""

    def load(self, source: Source, stem: str) -> StoredWeight:
        """Returns the matrix; WeightError where its parts do not go together."""


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """One int8 or float8 for each weight, and scales beside them."""

    format: WeightFormat
    marker: str  # "weight_scale", or "weight_scale_inv" (which multiplies, in spite of its name)

    @property
    def parts(self) -> tuple[str, ...]:
        """Every part that belongs to a quantised matrix."""
        return ("weight", self.marker, "input_scale")

    def shape(self, source: Source, stem: str) -> tuple[int, int]:
        """Returns `[out, in]`."""
        return _two(source.shape(f"{stem}.weight"))

    def load(self, source: Source, stem: str) -> StoredWeight:
        """Returns the matrix."""
        data = source.read(f"{stem}.weight")
        wanted = _NUMPY_TYPES[self.format.type]
        if data.dtype != wanted:
            raise WeightError(f"the data is {data.dtype}; config.json says {wanted}")
        out_size, in_size = data.shape
        groups = self.format.num_groups(in_size)
        scale = source.read(f"{stem}.{self.marker}").astype(np.float32)
        if scale.size == 1:  # of the whole matrix
            scale = np.full((-(-out_size // self.format.rows), groups), scale.reshape(()))
        scale = scale.reshape(len(scale), -1)
        _check_shape("scale", scale, (-(-out_size // self.format.rows), groups))
        input_scale = None
        if self.format.activations == "static":
            input_scale = source.read(f"{stem}.input_scale").astype(np.float32)
            _check_shape("input_scale", input_scale.reshape(-1), (1,))
            input_scale = input_scale.reshape(())
        return StoredWeight(data=data, scale=_turned(scale), input_scale=input_scale)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """compressed-tensors' `pack-quantized`: 4 or 8 bit in words along a row, offset to unsigned."""

    format: WeightFormat
    marker: str = "weight_packed"
    parts: tuple[str, ...] = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
    )

    def shape(self, source: Source, stem: str) -> tuple[int, int]:
        """Returns `[out, in]`."""
        return _two(tuple(source.read(f"{stem}.weight_shape").reshape(-1).tolist()))

    def load(self, source: Source, stem: str) -> StoredWeight:
        """Returns the matrix."""
        bits = _bits(self.format)
        out_size, in_size = self.shape(source, stem)
        groups = self.format.num_groups(in_size)
        data = unpack(source.read(f"{stem}.weight_packed"), bits)[:, :in_size]
        _check_shape("data", data, (out_size, in_size))
        scale = source.read(f"{stem}.weight_scale").astype(np.float32)
        _check_shape("scale", scale, (out_size, groups))
        zero = None
        if self.format.has_zero:
            packed = source.read(f"{stem}.weight_zero_point")  # along columns
            zero = unpack(packed.T, bits)[:, :out_size]
            _check_shape("zero_point", zero, (groups, out_size))
        order = None
        if self.format.has_order:
            order = _order(source.read(f"{stem}.weight_g_idx"), groups)
        return _signed(self.format, data, _turned(scale), zero, order)


@dataclass(frozen=True, kw_only=True)
class Awq:
    """AutoAWQ's gemm layout: `[in, out / 8]` words, zero points packed alike."""

    format: WeightFormat
    marker: str = "qweight"
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales")

    def shape(self, source: Source, stem: str) -> tuple[int, int]:
        """Returns `[out, in]`."""
        in_size, words = _two(source.shape(f"{stem}.qweight"))
        return words * 8, in_size

    def load(self, source: Source, stem: str) -> StoredWeight:
        """Returns the matrix."""
        out_size, in_size = self.shape(source, stem)
        groups = self.format.num_groups(in_size)
        data, zero = (
            _in_awq_order(unpack(source.read(f"{stem}.{part}"), 4))
            for part in ("qweight", "qzeros")
        )
        scale = source.read(f"{stem}.scales").astype(np.float32)
        _check_shape("scales", scale, (groups, out_size))
        _check_shape("qzeros", zero, (groups, out_size))
        return _signed(self.format, np.ascontiguousarray(data.T), scale, zero, None)


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """AutoGPTQ's layout: `[in / pack, out]` words, and each column's group in `g_idx`."""

    format: WeightFormat
    is_symmetric: bool
    zero_offset: int  # 1: stored zero points are one less than they mean
    marker: str = "qweight"
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def shape(self, source: Source, stem: str) -> tuple[int, int]:
        """Returns `[out, in]`."""
        words, out_size = _two(source.shape(f"{stem}.qweight"))
        return out_size, words * (32 // _bits(self.format))

    def load(self, source: Source, stem: str) -> StoredWeight:
        """Returns the matrix."""
        bits = _bits(self.format)
        out_size, in_size = self.shape(source, stem)
        groups = self.format.num_groups(in_size)
        data = unpack(np.ascontiguousarray(source.read(f"{stem}.qweight").T), bits)
        scale = source.read(f"{stem}.scales").astype(np.float32)
        _check_shape("scales", scale, (groups, out_size))
        zero = unpack(source.read(f"{stem}.qzeros"), bits) + self.zero_offset
        _check_shape("qzeros", zero, (groups, out_size))
        if self.is_symmetric and (zero != 2 ** (bits - 1)).any():
            raise WeightError(f"config.json says sym, but zero points are not {2 ** (bits - 1)}")
        order = None
        if f"{stem}.g_idx" in source.names and groups > 1:
            order = _order(source.read(f"{stem}.g_idx"), groups)
            if not self.format.has_order:
                if (order != np.arange(in_size)).any():
                    raise WeightError("g_idx permutes columns, but config.json says no desc_act")
                order = None
        elif self.format.has_order:
            raise WeightError("config.json says desc_act, but there is no g_idx")
        return _signed(self.format, data, scale, None if self.is_symmetric else zero, order)


def scheme_for(config: dict[str, Any]) -> Scheme:
    """Returns the scheme of config.json's `quantization_config`; WeightError if not supported."""
    if not isinstance(config, dict):
        raise WeightError(
            f"config.json: quantization_config is {str(config)[:80]!r}; it must be an object"
        )
    method = config.get("quant_method")
    readers = {
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "awq": _awq,
        "gptq": _gptq,
    }
    if method not in readers:
        raise WeightError(
            f"config.json: quantization method {method!r} is not supported; supported: {SUPPORTED}"
        )
    return readers[method](config)


def _compressed_tensors(config: dict[str, Any]) -> Scheme:
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise _refused("compressed-tensors", "config_groups", groups, "one group for ['Linear']")
    weights = groups[0].get("weights") or {}
    layout = groups[0].get("format") or config.get("format")
    kind = (weights.get("type"), weights.get("num_bits"))
    strategy = weights.get("strategy")
    if layout == "pack-quantized":
        return _pack_quantized(weights)
    types = {("int", 8): "int8", ("float", 8): "float8_e4m3fn"}
    if layout not in ("int-quantized", "float-quantized", "naive-quantized") or kind not in types:
        supported = "int-quantized and float-quantized of 8 bit, pack-quantized of 4 and 8 bit"
        raise _refused("compressed-tensors", "format", (layout, *kind), supported)
    if not weights.get("symmetric", True):
        raise _refused("compressed-tensors", "symmetric", False, "true")
    format = WeightFormat(
        type="int8" if kind[0] == "int" else "float8_e4m3fn",
        activations=_activations(groups[0].get("input_activations"), str(kind[0])),
    )
    if strategy == "block":
        block = weights.get("block_structure")
        rows, columns = _block("compressed-tensors", "block_structure", block)
        format = dataclasses.replace(format, rows=rows, columns=columns)
    elif strategy == "group":
        format = dataclasses.replace(format, columns=_columns(weights.get("group_size")))
    elif strategy not in ("channel", "tensor"):
        supported = "tensor, channel, group, block"
        raise _refused("compressed-tensors", "strategy", strategy, supported)
    return Scaled(format=format, marker="weight_scale")


def _pack_quantized(weights: dict[str, Any]) -> Scheme:
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if weights.get("type") != "int" or bits not in (4, 8):
        kind = (weights.get("type"), bits)
        raise _refused("compressed-tensors", "pack-quantized", kind, "int of 4 or 8 bit")
    if strategy not in ("channel", "group"):
        raise _refused("compressed-tensors", "strategy", strategy, "channel, group")
    return Packed(
        format=WeightFormat(
            type="int4" if bits == 4 else "int8",
            columns=_columns(weights.get("group_size")) if strategy == "group" else None,
            has_zero=not weights.get("symmetric", True),
            has_order=weights.get("actorder") in ("group", "dynamic", True),
            # Whatever input_activations says: packed weights are multiplied as floats.
        )
    )


def _activations(config: dict[str, Any] | None, kind: str) -> Literal["float", "dynamic", "static"]:
    if config is None:
        return "float"
    found = (config.get("type", kind), config.get("num_bits"), config.get("symmetric", True))
    if found != (kind, 8, True):
        supported = f"symmetric {kind} of 8 bit"
        raise _refused("compressed-tensors", "input_activations", found, supported)
    return "dynamic" if config.get("dynamic") else "static"


def _block(method: str, key: str, block: Any) -> tuple[int, int]:
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise _refused(method, key, block, "[rows, columns]")
    return sizes[0], sizes[1]


def _fp8(config: dict[str, Any]) -> Scheme:
    if config.get("fmt", "e4m3") != "e4m3":
        raise _refused("fp8", "fmt", config["fmt"], "e4m3")
    activations = config.get("activation_scheme", "dynamic")
    if activations not in ("dynamic", "static"):
        raise _refused("fp8", "activation_scheme", activations, "dynamic, static")
    format = WeightFormat(type="float8_e4m3fn", activations=activations)
    block = config.get("weight_block_size")
    if block is None:
        return Scaled(format=format, marker="weight_scale")
    rows, columns = _block("fp8", "weight_block_size", block)
    format = dataclasses.replace(format, rows=rows, columns=columns)
    return Scaled(format=format, marker="weight_scale_inv")


def _awq(config: dict[str, Any]) -> Scheme:
    bits, version = config.get("bits", config.get("w_bit")), config.get("version", "gemm")
    if bits != 4:
        raise _refused("awq", "bits", bits, "4")
    if str(version).lower() != "gemm":
        raise _refused("awq", "version", version, "gemm")
    if not config.get("zero_point", True):
        raise _refused("awq", "zero_point", False, "true")
    columns = _columns(config.get("group_size", config.get("q_group_size")))
    return Awq(format=WeightFormat(type="int4", columns=columns, has_zero=True))


def _gptq(config: dict[str, Any]) -> Scheme:
    bits, layout = config.get("bits"), config.get("checkpoint_format", "gptq")
    if bits not in (4, 8):
        raise _refused("gptq", "bits", bits, "4, 8")
    if layout not in ("gptq", "gptq_v2"):
        raise _refused("gptq", "checkpoint_format", layout, "gptq, gptq_v2")
    if config.get("is_marlin_format"):
        raise _refused("gptq", "is_marlin_format", True, "false")
    if config.get("dynamic"):
        raise _refused("gptq", "dynamic", config["dynamic"], "none: all modules alike")
    columns = _columns(config.get("group_size"))
    is_symmetric = bool(config.get("sym", True))
    return Gptq(
        format=WeightFormat(
            type="int4" if bits == 4 else "int8",
            columns=columns,
            has_zero=not is_symmetric,
            has_order=bool(config.get("desc_act")) and columns is not None,
        ),
        is_symmetric=is_symmetric,
        zero_offset=1 if layout == "gptq" else 0,
    )


def _columns(group_size: Any) -> int | None:
    if group_size == -1:
        return None
    if type(group_size) is not int or group_size < 1:
        raise WeightError(f"config.json: quantization group_size is {group_size!r}")
    return group_size


def _refused(method: str, key: str, value: Any, supported: str) -> WeightError:
    return WeightError(
        f"config.json: quantization {method}: {key} = {str(value)[:80]} is not supported; "
        f"supported: {supported}"
    )


def unpack(
    words: np.ndarray,  # [rows, words] i32
    bits: int,
) -> np.ndarray:  # [rows, words * 32 / bits] i16, unsigned values, the low bits first
    """Returns what 32-bit words hold."""
    words = np.ascontiguousarray(words)
    if words.dtype != np.int32 or words.ndim != 2:
        raise WeightError(f"packed numbers are {words.dtype} {words.shape}; expected int32 words")
    as_bytes = words.astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return as_bytes.astype(np.int16)
    halves = np.stack([as_bytes & 15, as_bytes >> 4], axis=2)
    return halves.reshape(len(words), -1).astype(np.int16)


def _in_awq_order(
    values: np.ndarray,  # [rows, columns]
) -> np.ndarray:  # [rows, columns]
    ordered = np.empty((len(values), values.shape[1] // 8, 8), values.dtype)
    ordered[:, :, list(_AWQ_ORDER)] = values.reshape(ordered.shape)
    return ordered.reshape(values.shape)


def _order(
    group_of: np.ndarray,  # [in]
    groups: int,
) -> np.ndarray:  # [in] i32
    # Which column of the model each stored column is to be, once groups lie side by side.
    counts = np.bincount(group_of, minlength=groups) if (group_of >= 0).all() else np.zeros(0)
    if len(counts) != groups or (counts != len(group_of) // groups).any():
        raise WeightError(f"g_idx does not divide {len(group_of)} columns into {groups} groups")
    return np.argsort(group_of, kind="stable").astype(np.int32)


def _signed(
    format: WeightFormat,
    data: np.ndarray,  # [out, in] unsigned values, columns in the model's order
    scale: np.ndarray,  # [groups, out] f32
    zero: np.ndarray | None,  # [groups, out] unsigned values
    order: np.ndarray | None,
) -> StoredWeight:
    middle = 2 ** (_bits(format) - 1)
    if order is not None:
        data = data[:, order]
    if zero is not None:
        zero = zero - middle
        if zero.max() > 127:
            raise WeightError(f"zero point {zero.max() + middle} exceeds {127 + middle}")
        zero = (zero * ZERO_STEPS[format.type]).astype(np.int8)
    data = (data - np.int16(middle)).astype(_NUMPY_TYPES[format.type])
    return StoredWeight(data=data, scale=scale, zero=zero, order=order)


_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "int4": np.dtype(ml_dtypes.int4),
    "int8": np.dtype(np.int8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


def _bits(format: WeightFormat) -> int:
    return 4 if format.type == "int4" else 8


def _turned(scale: np.ndarray) -> np.ndarray:  # [out, groups] -> [groups, out]
    return np.ascontiguousarray(scale.T)


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise WeightError(f"a quantised matrix has shape {shape}; expected two dimensions")
    return shape[0], shape[1]


def _check_shape(what: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise WeightError(f"{what} has shape {array.shape}; expected {shape}")
