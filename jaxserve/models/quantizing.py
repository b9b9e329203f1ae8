"""Decides which parameters are quantised at load, and what their arrays are."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.errors import WeightError
from jaxserve.mesh import sharding_for
from jaxserve.models.checkpoint import WeightFormat
from jaxserve.ops.quantization import (
    QuantizedWeight,
    form_for,
    largest,
    multiplies_natively,
    quantize,
)

Axes: TypeAlias = tuple[str | None, ...]

TYPE_OF = {"int4": "int4", "int8": "int8", "fp8": "float8_e4m3fn"}
_INT4_COLUMNS = 32  # that share a scale


def is_layer_matrix(axes: Axes) -> bool:
    """Returns whether a parameter is a matrix that a layer multiplies by.

    Embedding and head are none: they stay in 16 bit, as vLLM keeps them.
    """
    return len(axes) == 2 and "vocab" not in axes


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
    if shape[1] % _INT4_COLUMNS:
        raise WeightError(
            f"int4 needs widths that {_INT4_COLUMNS} divides; a matrix has shape {shape}"
        )
    return WeightFormat(type="int4", columns=_INT4_COLUMNS, has_zero=True)


def abstract_weight(
    format: WeightFormat,
    dense: jax.ShapeDtypeStruct,  # [out, in]
    axes: Axes,
    mesh: Mesh,
) -> QuantizedWeight:
    """Returns the arrays of a quantised matrix, as ShapeDtypeStructs with shardings.

    Scales follow the matrix where the mesh divides them as it does the matrix.
    """
    out_size, in_size = dense.shape
    out_axis, in_axis = axes
    groups = format.num_groups(in_size)
    dtype = jnp.dtype(format.type)
    device = mesh.devices.flat[0]

    def array(
        shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *axes: str | None
    ) -> jax.ShapeDtypeStruct:
        whole = sharding_for(mesh, (None,) * len(shape))
        sharding = sharding_for(mesh, axes)
        is_even = all(
            size % (np.prod([mesh.shape[name] for name in _names(part)], dtype=int)) == 0
            for size, part in zip(shape, sharding.spec, strict=False)
        )
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding if is_even else whole)

    zero = array((groups, out_size), jnp.int8, in_axis, out_axis)
    leaves: dict[str, Any] = {  # typed as arrays, which these stand for
        "data": jax.ShapeDtypeStruct(dense.shape, dtype, sharding=dense.sharding),
        "scale": array((groups, -(-out_size // format.rows)), jnp.float32, in_axis, out_axis),
        "zero": zero if format.has_zero else None,
        "order": array((in_size,), jnp.int32, None) if format.has_order else None,
        "input_scale": array((), jnp.float32) if format.activations == "static" else None,
    }
    return QuantizedWeight(
        **leaves,
        rows=format.rows,
        dtype=dense.dtype.name,
        form=form_for(
            device.platform,
            is_native=multiplies_natively(device, dtype),
            activations=format.activations,
            num_groups=groups,
            has_zero=format.has_zero,
            in_size=in_size,
        ),
    )


def quantized_arrays(
    weight: QuantizedWeight,  # of ShapeDtypeStructs
    dense: jax.Array,  # [out, in]
) -> list[jax.Array]:
    """Returns the arrays of a matrix that is quantised at load, made on its devices."""
    arrays = _quantizer(tuple(jax.tree.leaves(weight)), weight.num_groups)(dense)
    return [array for array in arrays if array is not None]


@functools.lru_cache(maxsize=64)  # a model has few shapes, and compiles for each once
def _quantizer(shapes: tuple[jax.ShapeDtypeStruct, ...], num_groups: int) -> jax.stages.Wrapped:
    def make(dense: jax.Array) -> tuple[jax.Array, ...]:
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
        arrays["input_scale"] = np.float32(8 / largest(dtype))
    return [jax.device_put(array, getattr(weight, name).sharding) for name, array in arrays.items()]


def num_bytes(shape: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of an array on a device, where two int4 share one."""
    if shape.dtype == jnp.int4:
        return -(-shape.size // 2)
    return shape.size * shape.dtype.itemsize


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(part)
