"""Decides which parameters are quantised at load, and what their arrays are."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import WeightError
from jaxserve.mesh import num_parts, put, sharding_for
from jaxserve.models.checkpoint import WeightFormat
from jaxserve.models.checkpoint.contract import StoredWeight
from jaxserve.ops.quantization import (
    Kernel,
    QuantizedWeight,
    form_for,
    kernel_refusal,
    largest,
    multiplies_natively,
    quantize,
)

Axes: TypeAlias = tuple[str | None, ...]

TYPE_OF = {"int4": "int4", "int8": "int8", "fp8": "float8_e4m3fn"}
_INT4_COLUMNS = 32  # that share a scale


def is_layer_matrix(axes: Axes) -> bool:
    """Returns whether a parameter is a matrix that a layer multiplies by, or a stack of them.

    Embedding, head and routers are none: they stay in 16 bit, as vLLM keeps them.
    """
    return len(axes) in (2, 3) and not {"vocab", "router"} & set(axes)


def load_time_format(
    quantization: str,  # as `EngineConfig` has it
    axes: Axes,
    shape: tuple[int, ...],
) -> WeightFormat | None:
    """Returns how a parameter is quantised as it is loaded; None keeps it as it is.

    int4 leaves 8 bit to the matrices that make keys and values: they are small where heads share
    them, and rounded to 4 bit they cost more than all the others (Qwen2.5-Coder-0.5B: 3 % of the
    weights, two thirds of what its perplexity rises by). Raises WeightError for a width that int4
    cannot divide.
    """
    if quantization == "auto" or not is_layer_matrix(axes):
        return None
    if quantization == "int8" or (quantization == "int4" and axes[0] == "kv_heads"):
        return WeightFormat(type="int8")
    if quantization == "fp8":
        return WeightFormat(type="float8_e4m3fn", activations="dynamic")
    assert quantization == "int4", quantization
    if shape[-1] % _INT4_COLUMNS:
        raise WeightError(
            f"int4 needs widths that {_INT4_COLUMNS} divides; a matrix has shape {shape}"
        )
    return WeightFormat(type="int4", columns=_INT4_COLUMNS, has_zero=True)


def abstract_weight(
    format: WeightFormat,
    dense: jax.ShapeDtypeStruct,  # [out, in], or [experts, out, in]
    axes: Axes,
    mesh: Mesh,
    *,
    uses_kernels: bool = True,
) -> QuantizedWeight:
    """Returns the arrays of a quantised matrix, as ShapeDtypeStructs with shardings.

    Scales are split as the matrix is, and one scale for all columns is whole on each device.
    Raises WeightError for columns in another order that the mesh would split.
    """
    if len(axes) == 3:
        return _abstract_stack(format, dense, axes, mesh)
    out_size, in_size = dense.shape
    out_axis, in_axis = axes
    if format.has_order and num_parts(mesh, in_axis) > 1:
        raise WeightError(
            f"a mesh with tensor={num_parts(mesh, in_axis)} cannot split columns that are stored "
            "in another order (desc_act, g_idx); use the data axis alone"
        )
    format = _fitting(format, dense.shape, axes, mesh)
    groups = format.num_groups(in_size)
    dtype = jnp.dtype(format.type)
    device = mesh.devices.flat[0]
    group_axis = None if groups == 1 else in_axis

    def array(
        shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *axes: str | None
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_for(mesh, axes))

    zero = array((groups, out_size), jnp.int8, group_axis, out_axis)
    leaves: dict[str, Any] = {  # typed as arrays, which these stand for
        "data": jax.ShapeDtypeStruct(dense.shape, dtype, sharding=dense.sharding),
        "scale": array((groups, -(-out_size // format.rows)), jnp.float32, group_axis, out_axis),
        "zero": zero if format.has_zero else None,
        "order": array((in_size,), jnp.int32, None) if format.has_order else None,
        "input_scale": array((), jnp.float32) if format.activations == "static" else None,
    }
    weight = QuantizedWeight(**leaves, rows=format.rows, dtype=dense.dtype.name)
    form = form_for(
        device.platform,
        is_native=multiplies_natively(device, dtype),
        has_kernel=uses_kernels and _refusal(weight, device) is None,
        activations=format.activations,
        num_groups=groups,
        has_zero=format.has_zero,
        in_size=in_size // num_parts(mesh, in_axis),
    )
    return dataclasses.replace(weight, form=form)


def _refusal(
    weight: QuantizedWeight,  # of ShapeDtypeStructs
    device: jax.Device,
) -> str | None:
    """Returns why no kernel multiplies by each device's part of a matrix."""
    (out_size, in_size), (num_groups, _) = (
        leaf.sharding.shard_shape(leaf.shape) for leaf in (weight.data, weight.scale)
    )
    return kernel_refusal(
        device,
        weight.data.dtype,
        dense_dtype=jnp.dtype(weight.dtype),
        out_size=out_size,
        in_size=in_size,
        num_groups=num_groups,
    )


@dataclass(frozen=True, kw_only=True)
class ProductsChoice:
    """What multiplies by the matrices whose scales belong to groups of columns."""

    backend: str
    warning: str | None  # why it is not a kernel


def products_choice(
    weights: Iterable[Any],  # a model's parameters, of ShapeDtypeStructs
    device: jax.Device,
) -> ProductsChoice | None:
    """Returns what was chosen for a model's matrices; None if no scale belongs to a group.

    Experts are left out: they are chosen for by `ops.moe`.
    """
    grouped = [
        weight
        for weight in weights
        if isinstance(weight, QuantizedWeight) and weight.data.ndim == 2 and weight.num_groups > 1
    ]
    if not grouped:
        return None
    kernels = {weight.form.backend for weight in grouped if isinstance(weight.form, Kernel)}
    others = [weight for weight in grouped if not isinstance(weight.form, Kernel)]
    backend = " and ".join([*sorted(kernels), *(["reference"] if others else [])])
    reason = _refusal(others[0], device) if others else None
    if reason is None or device.platform == "cpu":  # nobody misses a kernel
        return ProductsChoice(backend=backend, warning=None)
    warning = (
        f"{len(others)} of {len(grouped)} matrices quantised by groups are multiplied by the "
        f"slower reference, not by a kernel: {reason}"
    )
    return ProductsChoice(backend=backend, warning=warning)


def _abstract_stack(
    format: WeightFormat,
    dense: jax.ShapeDtypeStruct,  # [experts, out, in]
    axes: Axes,
    mesh: Mesh,
) -> QuantizedWeight:
    """Returns the arrays of experts' quantised matrices: each those of one, stacked."""
    of_one = jax.ShapeDtypeStruct(
        dense.shape[1:], dense.dtype, sharding=sharding_for(mesh, axes[1:])
    )
    (expert_part,) = sharding_for(mesh, axes[:1]).spec

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        parts = PartitionSpec(expert_part, *leaf.sharding.spec)
        return jax.ShapeDtypeStruct(
            (dense.shape[0], *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, parts)
        )

    # One expert's matrix at a time is taken out of its stack: by XLA, which no kernel reads.
    return jax.tree.map(
        stacked, abstract_weight(format, of_one, axes[1:], mesh, uses_kernels=False)
    )


def _fitting(
    format: WeightFormat,
    shape: tuple[int, ...],  # [out, in]
    axes: Axes,
    mesh: Mesh,
) -> WeightFormat:
    """Returns the format with so few rows and columns to a scale that devices share none."""
    out_part, in_part = (
        size // num_parts(mesh, axis) for size, axis in zip(shape, axes, strict=True)
    )
    rows, columns = format.rows, format.columns
    if num_parts(mesh, axes[0]) > 1:
        rows = math.gcd(rows, out_part)
    if num_parts(mesh, axes[1]) > 1 and columns is not None:
        columns = math.gcd(columns, in_part)
    return dataclasses.replace(format, rows=rows, columns=columns)


def refine(stored: StoredWeight, rows: int, weight: QuantizedWeight) -> StoredWeight:
    """Returns a stored matrix, `rows` of which share a scale, for the smaller groups of `weight`.

    A mesh asks for them where it would else split a group.
    """
    parts = weight.num_groups // len(stored.scale)
    scale = np.repeat(stored.scale, parts, axis=0)
    scale = np.repeat(scale, rows // weight.rows, axis=1)[:, : weight.scale.shape[1]]
    zero = None if stored.zero is None else np.repeat(stored.zero, parts, axis=0)
    return dataclasses.replace(stored, scale=scale, zero=zero)


def quantized_arrays(
    weight: QuantizedWeight,  # of ShapeDtypeStructs
    dense: jax.Array,  # [out, in], or [experts, out, in]
) -> list[jax.Array]:
    """Returns the arrays of a matrix that is quantised at load, made on its devices."""
    arrays = _quantizer(tuple(jax.tree.leaves(weight)), weight.num_groups)(dense)
    return [array for array in arrays if array is not None]


@functools.lru_cache(maxsize=64)  # a model has few shapes, and compiles for each once
def _quantizer(shapes: tuple[jax.ShapeDtypeStruct, ...], num_groups: int) -> jax.stages.Wrapped:
    def make(dense: jax.Array) -> tuple[jax.Array, ...]:
        if dense.ndim == 3:  # one by one: floats take several times the room of what stays
            return jax.lax.map(make, dense)
        arrays = quantize(dense, shapes[0].dtype, num_groups)
        return tuple(array for array in arrays if array is not None)

    return jax.jit(make, out_shardings=tuple(shape.sharding for shape in shapes))


def dummy_arrays(
    weight: QuantizedWeight,  # of ShapeDtypeStructs
    random: np.random.Generator,
) -> list[jax.Array]:
    """Returns random arrays of a quantised matrix; what they stand for has deviation 0.02."""
    dtype, deviation = weight.data.dtype, 0.02
    if jnp.issubdtype(dtype, jnp.integer):
        top = int(largest(dtype))
        data = random.integers(-top, top, weight.data.shape, np.int8, endpoint=True)
        unit = top / 3**0.5  # deviation of uniform numbers
    else:
        unit = largest(dtype) / 8
        data = random.standard_normal(weight.data.shape, np.float32) * unit
    arrays: dict[str, Any] = {
        "data": data.astype(dtype),
        "scale": np.full(weight.scale.shape, deviation / unit, np.float32),
    }
    if weight.zero is not None:
        arrays["zero"] = np.zeros(weight.zero.shape, np.int8)
    if weight.order is not None:
        arrays["order"] = random.permutation(weight.order.shape[0]).astype(np.int32)
    if weight.input_scale is not None:
        arrays["input_scale"] = np.array(8 / largest(dtype), np.float32)
    return [put(array, getattr(weight, name).sharding) for name, array in arrays.items()]


def num_bytes(shape: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of an array on each of its devices, where two int4 share one."""
    size = math.prod(shape.sharding.shard_shape(shape.shape))
    if shape.dtype == jnp.int4:
        return -(-size // 2)
    return size * shape.dtype.itemsize
