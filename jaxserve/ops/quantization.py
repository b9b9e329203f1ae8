"""Quantised weights: what stands in place of an array, how it is made, and how it is multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType
from typing import Literal, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_matmul import Backend, device_refusal, quantized_matmul, refusal

Activations: TypeAlias = Literal["float", "dynamic", "static"]


@dataclass(frozen=True, kw_only=True)
class Fused:
    """The weight is converted inside the product; each group's product is scaled.

    TPU and GPU compilers read a converted operand as it is stored and keep no copy, where a row has
    one scale. With groups, a TPU's copies the matrix, transposed, and multiplies group by group
    (`scripts/targets/weight_kernels.py`); a GPU's writes every group's product to memory.
    """


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A block of rows at a time is converted, scaled and multiplied.

    A block's floats stay in the processor's cache. On a CPU (2 cores, 1536 x 576, 2 to 512 rows)
    int8 by blocks takes 1.0 to 1.6 times what bfloat16 weights take; converted as a whole, 5 to 7
    times; int8 activations times int8 weights, 0.6 at 2 rows and 1.5 at 512. int4 takes 2 to 5
    times and float8 4 to 9 at few rows, because their conversion is scalar code.
    """

    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A Pallas kernel converts parts of the weight where it multiplies them."""

    backend: Backend
    max_rows: int | None  # of x; None: any number
    otherwise: Fused | Blocks  # for more rows


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Activations are quantised to the weight's type too, and the product is in that type."""

    is_static: bool  # by `input_scale`; else by each row's largest


Form: TypeAlias = Fused | Kernel | Blocks | Quantized

# The floats of a block: on a CPU measured, on a GPU a third of an H100's second-level cache.
_CPU_BLOCK_ROWS = 256
_GPU_BLOCK_BYTES = 16 * 2**20
# Every 64 rows the GPU kernel reads the weight again; by blocks it is read once, and its floats, of
# four to seven times the bytes, written and read.
_GPU_KERNEL_ROWS = 256
_KERNELS: dict[str, Backend] = {"tpu": "tpu", "gpu": "triton"}
_LEAST_SCALE = 1e-12  # of a group of zeros

# int4's zeros count eighths of a level. A whole one misses a group's middle by up to half a level,
# which is as much as rounding costs: of SmolLM2's perplexity a quarter.
_INT4_ZERO_STEPS = 8


@flax.struct.dataclass
class QuantizedWeight:
    """A matrix `[out, in]` as small numbers times scales, where models have an array.

    A stack of matrices, one for each expert, has a dimension before those of every array.

    With `group` columns and `rows` rows sharing a scale, entry [o, i] means
    `(data[o, i] - zero[i // group, o] / zero_steps(dtype)) * scale[i // group, o // rows]`.
    """

    data: jax.Array  # [out, in] int4, int8 or float8
    scale: jax.Array  # [groups, out / rows, rounded up]
    zero: jax.Array | None = None  # [groups, out] i8
    order: jax.Array | None = None  # [in] i32, for each column of data, which one of x it is for
    input_scale: jax.Array | None = None  # [] f32, of statically quantised activations
    rows: int = flax.struct.field(pytree_node=False, default=1)
    dtype: str = flax.struct.field(pytree_node=False, default="bfloat16")  # it stands for
    form: Form = flax.struct.field(pytree_node=False, default=Fused())

    def __getitem__(self, index: EllipsisType) -> QuantizedWeight:
        """Returns itself: modules read an `nnx.Param` as `weight[...]`."""
        assert index is ..., index
        return self

    @property
    def num_groups(self) -> int:
        """How many parts the columns fall into, each with scales of its own."""
        return self.scale.shape[-2]

    def row_scales(self) -> jax.Array:  # [groups, out] f32
        """Returns each row's scales."""
        scale = self.scale.astype(jnp.float32)
        if self.rows > 1:
            scale = jnp.repeat(scale, self.rows, axis=1)[:, : self.data.shape[0]]
        return scale

    def levels_of_zero(self) -> jax.Array:  # [groups, out] f32
        """Returns what is taken from the data of a weight that has zeros."""
        assert self.zero is not None
        return self.zero.astype(jnp.float32) / zero_steps(self.data.dtype)


def zero_steps(dtype: jax.typing.DTypeLike) -> int:
    """Returns what number in `zero` stands for one level of data of a type."""
    return _INT4_ZERO_STEPS if jnp.dtype(dtype) == jnp.int4 else 1


def quantize(
    weight: jax.Array,  # [out, in] float
    dtype: jax.typing.DTypeLike,  # int4, int8 or float8
    num_groups: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:  # [out, in], [groups, out] f32, zero or None
    """Returns the nearest data, scales and zeros, as `QuantizedWeight` holds them.

    int8 and float8 are symmetric. Sixteen levels are too few for that: int4 gets zeros, and each
    group the steps, of some that are tried, that leave the least square error.
    """
    groups = weight.astype(jnp.float32).reshape(weight.shape[0], num_groups, -1)
    if jnp.dtype(dtype) == jnp.int4:
        scale, zero = _fitted(groups)
        data = _levels(groups, scale, zero).reshape(weight.shape).astype(dtype)
        return data, scale.T, zero.T.astype(jnp.int8)
    scale = jnp.maximum(jnp.abs(groups).max(2) / largest(dtype), _LEAST_SCALE)
    data = round_to(groups / scale[:, :, None], dtype)
    return data.reshape(weight.shape), scale.T, None


def _fitted(
    groups: jax.Array,  # [out, groups, columns] f32
) -> tuple[jax.Array, jax.Array]:  # [out, groups] f32: scale, and zero in steps of its own
    """Returns int4's steps for each group: the best of some ranges, then fitted to its levels.

    The fit is that of half-quadratic quantisation without its outliers: levels and steps take
    turns at being the nearest (https://mobiusml.github.io/hqq_blog).
    """
    top, bottom = groups.max(2), groups.min(2)
    middle = (top + bottom) / 2
    # A group far from 0 gets wider steps, so that its zero fits 8 bits.
    half = jnp.maximum((top - bottom) / 2, jnp.abs(middle) / 2)

    def narrow(index: jax.Array, best: _Steps) -> _Steps:
        part = 1 - 0.05 * index.astype(jnp.float32)
        scale = jnp.maximum(2 * half * part / 15, _LEAST_SCALE)
        return _better(groups, best, scale, (half * part - middle) / scale - 8)

    def fit(index: jax.Array, best: _Steps) -> _Steps:
        levels = _levels(groups, best.scale, best.zero)
        mean = levels.mean(2)
        apart = levels - mean[:, :, None]
        slope = (apart * groups).sum(2) / jnp.maximum((apart**2).sum(2), 1)
        scale = jnp.where(slope > _LEAST_SCALE, slope, best.scale)
        return _better(groups, best, scale, mean - groups.mean(2) / scale)

    nothing = jnp.zeros(half.shape, jnp.float32)
    best = _Steps(error=jnp.full(half.shape, jnp.inf, jnp.float32), scale=nothing, zero=nothing)
    best = lax.fori_loop(0, 6, narrow, best)
    best = lax.fori_loop(0, 3, fit, best)
    return best.scale, best.zero


@flax.struct.dataclass
class _Steps:
    """A choice for each group, and what it costs."""

    error: jax.Array  # [out, groups] f32, squared and summed
    scale: jax.Array  # [out, groups] f32
    zero: jax.Array  # [out, groups] f32, in steps of its own


def _better(
    groups: jax.Array,  # [out, groups, columns] f32
    best: _Steps,
    scale: jax.Array,  # [out, groups] f32
    zero: jax.Array,  # [out, groups] f32, in levels
) -> _Steps:
    """Returns the best, or in groups where they err less, these."""
    zero = jnp.clip(jnp.round(zero * _INT4_ZERO_STEPS), -128, 127)
    shift = (zero / _INT4_ZERO_STEPS)[:, :, None]
    values = (_levels(groups, scale, zero) - shift) * scale[:, :, None]
    error = ((values - groups) ** 2).sum(2)
    is_better = error < best.error
    return _Steps(
        error=jnp.minimum(error, best.error),
        scale=jnp.where(is_better, scale, best.scale),
        zero=jnp.where(is_better, zero, best.zero),
    )


def _levels(
    groups: jax.Array,  # [out, groups, columns] f32
    scale: jax.Array,  # [out, groups] f32
    zero: jax.Array,  # [out, groups] f32, in steps of its own
) -> jax.Array:  # -8 to 7, like groups
    shift = (zero / _INT4_ZERO_STEPS)[:, :, None]
    return jnp.clip(jnp.round(groups / scale[:, :, None] + shift), -8, 7)


def form_for(
    platform: str,  # "cpu", "gpu" or "tpu"
    *,
    is_native: bool,  # the device multiplies the weight's type (`multiplies_natively`)
    has_kernel: bool,  # (`kernel_refusal`)
    activations: Activations,
    num_groups: int,
    has_zero: bool,
    in_size: int,
) -> Form:
    """Returns how a platform multiplies by a quantised weight.

    Activations stay float where the device has no product of the weight's type, where columns
    have scales of their own, and where there are zeros.
    """
    if platform == "cpu":
        return Blocks(num_rows=_CPU_BLOCK_ROWS)
    if activations != "float" and is_native and num_groups == 1 and not has_zero:
        return Quantized(is_static=activations == "static")
    if num_groups == 1:
        return Fused()
    if platform == "tpu":
        form = Fused()
        return Kernel(backend="tpu", max_rows=None, otherwise=form) if has_kernel else form
    blocks = Blocks(num_rows=max(256, _GPU_BLOCK_BYTES // (2 * in_size) // 128 * 128))
    if not has_kernel:
        return blocks
    return Kernel(backend="triton", max_rows=_GPU_KERNEL_ROWS, otherwise=blocks)


def kernel_refusal(
    device: jax.Device,
    dtype: jnp.dtype,  # of the stored numbers
    *,
    dense_dtype: jnp.dtype,  # that the weight stands for
    out_size: int,  # of the device's part, as the others
    in_size: int,
    num_groups: int,
) -> str | None:
    """Returns why no Pallas kernel multiplies by such a weight on a device; None if one does."""
    backend = _KERNELS.get(device.platform)
    if backend is None:
        return f"there is none for a {device.platform}"
    if num_groups == 1:
        return "a product with one scale a row needs none"
    if dense_dtype == jnp.float32:
        return "the kernels multiply bfloat16, not float32"
    if (reason := device_refusal(backend, device, dtype)) is not None:
        return reason
    return refusal(backend, dtype, out_size=out_size, in_size=in_size, groups=num_groups)


def multiplies_natively(device: jax.Device, dtype: jnp.dtype) -> bool:
    """Returns whether a device has a fast product of int8 or float8 operands."""
    if dtype == jnp.int4:
        return False  # activations would be rounded to its 16 levels
    if device.platform == "gpu":
        major, _, minor = str(device.compute_capability).partition(".")
        if not (major.isdecimal() and minor.isdecimal()):
            return False  # AMD's have names
        needed = (8, 9) if jnp.issubdtype(dtype, jnp.floating) else (7, 5)
        return (int(major), int(minor)) >= needed
    if device.platform == "tpu":  # the seventh generation has float8 in place of int8
        is_float8 = jnp.issubdtype(dtype, jnp.floating)
        return is_float8 == device.device_kind.startswith(("TPU7", "TPU v7"))
    return False


def multiply_quantized(
    x: jax.Array,  # [rows, in]
    weight: QuantizedWeight,  # [out, in]
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:  # [rows, out]
    """Returns `x @ weight.T`, summed in float32."""
    if x.shape[1] != weight.data.shape[1]:
        raise ValueError(f"{x.shape=} does not go with {weight.data.shape=}")
    if weight.order is not None:
        x = x[:, weight.order]
    form = weight.form
    if isinstance(form, Kernel):
        if form.max_rows is None or x.shape[0] <= form.max_rows:
            return _multiply_by_groups(x, weight, form.backend, out_dtype)
        form = form.otherwise
    match form:
        case Quantized(is_static=is_static):
            out = _multiply_quantized(x, weight, weight.input_scale if is_static else None)
        case Blocks(num_rows=num_rows):
            out = _multiply_by_blocks(x, weight, num_rows)
        case _ if weight.num_groups == 1 and weight.zero is None:
            dtype = jnp.dtype(weight.dtype)
            out = _dot(x.astype(dtype), weight.data.astype(dtype), jnp.float32)
            out *= weight.row_scales()
        case _:
            return _multiply_by_groups(x, weight, "reference", out_dtype)
    return out.astype(out_dtype)


def _dot(x: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _multiply_by_groups(
    x: jax.Array,  # [rows, in]
    weight: QuantizedWeight,  # [out, in]
    backend: Backend,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:  # [rows, out]
    return quantized_matmul(
        x.astype(weight.dtype),
        weight.data,
        weight.row_scales(),
        weight.zero,
        backend=backend,
        zero_steps=zero_steps(weight.data.dtype),
        out_dtype=out_dtype,
    )


def _multiply_by_blocks(
    x: jax.Array,  # [rows, in]
    weight: QuantizedWeight,  # [out, in]
    num_rows: int,
) -> jax.Array:  # [rows, out] f32
    out_size, dtype = weight.data.shape[0], jnp.dtype(weight.dtype)
    num_rows = min(num_rows, out_size)
    x, scale = x.astype(dtype), weight.row_scales()
    is_scaled_after = weight.num_groups == 1 and weight.zero is None

    def visit(block: jax.Array, out: jax.Array) -> jax.Array:
        # The last block starts early enough to be whole: rows in both come out the same.
        row = jnp.minimum(block * num_rows, out_size - num_rows)
        data = lax.dynamic_slice_in_dim(weight.data, row, num_rows)
        if is_scaled_after:
            dense = data.astype(dtype)
        else:
            zero = None
            if weight.zero is not None:
                zero = lax.dynamic_slice_in_dim(weight.levels_of_zero(), row, num_rows, 1)
            scales = lax.dynamic_slice_in_dim(scale, row, num_rows, 1)
            dense = _dense(data, scales, zero).astype(dtype)
        # Without the barrier the conversion would move into the product, element by element.
        product = _dot(x, lax.optimization_barrier(dense), jnp.float32)
        return lax.dynamic_update_slice(out, product, (0, row))

    out = jnp.zeros((x.shape[0], out_size), jnp.float32)
    out = lax.fori_loop(0, -(-out_size // num_rows), visit, out)
    return out * scale if is_scaled_after else out


def _multiply_quantized(
    x: jax.Array,  # [rows, in]
    weight: QuantizedWeight,  # [out, in]
    input_scale: jax.Array | None,  # [] f32; None: each row's own
) -> jax.Array:  # [rows, out] f32
    assert weight.zero is None, "zeros need float activations"
    top = largest(weight.data.dtype)
    x = x.astype(jnp.float32)
    if input_scale is None:
        input_scale = jnp.maximum(jnp.abs(x).max(1, keepdims=True) / top, _LEAST_SCALE)
    sums = jnp.float32 if jnp.issubdtype(weight.data.dtype, jnp.floating) else jnp.int32
    product = _dot(round_to(x / input_scale, weight.data.dtype), weight.data, sums)
    return product.astype(jnp.float32) * input_scale * weight.row_scales()


def largest(dtype: jax.typing.DTypeLike) -> float:
    """Returns the largest number that quantised values take: integers stay symmetric."""
    if jnp.issubdtype(dtype, jnp.integer):
        return float(jnp.iinfo(dtype).max)
    return float(jnp.finfo(dtype).max)


def round_to(
    x: jax.Array,  # any shape, f32
    dtype: jax.typing.DTypeLike,
) -> jax.Array:  # same shape
    """Returns the nearest values of `dtype`. What lies beyond its range becomes its largest."""
    top = largest(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        x = jnp.round(x)
    return jnp.clip(x, -top, top).astype(dtype)


def dequantize(weight: QuantizedWeight) -> jax.Array:  # [out, in] f32, columns in data's order
    """Returns the numbers that a quantised weight stands for."""
    zero = None if weight.zero is None else weight.levels_of_zero()
    return _dense(weight.data, weight.row_scales(), zero)


def _dense(
    data: jax.Array,  # [out, in]
    scale: jax.Array,  # [groups, out] f32
    zero: jax.Array | None,  # [groups, out] f32, in levels
) -> jax.Array:  # [out, in] f32
    groups = data.astype(jnp.float32).reshape(data.shape[0], scale.shape[0], -1)
    if zero is not None:
        groups -= zero.T[:, :, None]
    return (groups * scale.T[:, :, None]).reshape(data.shape)
