"""Matrix multiplication with stored weights, quantised or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.ops.quantization import QuantizedWeight, multiply_quantized


def linear(
    x: jax.Array,  # [rows, in]
    weight: jax.Array | QuantizedWeight,  # [out, in], as checkpoints store it
) -> jax.Array:  # [rows, out], of x's type
    """Returns `x @ weight.T`, multiplied in the weight's type and summed in float32."""
    if isinstance(weight, QuantizedWeight):
        return multiply_quantized(x, weight, x.dtype)
    return matmul_f32(x, weight).astype(x.dtype)


def matmul_f32(
    x: jax.Array,  # [rows, in]
    weight: jax.Array | QuantizedWeight,  # [out, in]
) -> jax.Array:  # [rows, out] f32
    """Returns `x @ weight.T` in float32.

    Asking for float32 sums of bfloat16 operands is what makes XLA's CPU backend use its fast path.
    """
    if isinstance(weight, QuantizedWeight):
        return multiply_quantized(x, weight)
    return lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
