"""Mixtures of experts: which experts each token goes to, and what they make of it.

Tokens are sorted by expert, multiplied by their experts' matrices, and put back. A token's result
is summed over its experts in the order of its own routing: whatever else is in the step, it is the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.ops.quantization import QuantizedWeight, multiply_quantized
from pallas_kernels.grouped_matmul import (
    Backend,
    device_refusal,
    entry_of,
    grouped_matmul,
    multiply_by_tiles,
)

ExpertWeight: TypeAlias = jax.Array | QuantizedWeight  # [experts, out, in]

_KERNELS: dict[str, Backend] = {"tpu": "tpu"}  # by platform


@dataclass(frozen=True, kw_only=True)
class ExpertsChoice:
    """What the products of a model's experts run on."""

    backend: Backend
    warning: str | None  # why it is not a kernel


def choose_experts_backend(
    requested: str,  # as `attention_backend` has it: "reference" keeps experts off kernels, too
    device: jax.Device,
    weights: Iterable[Any],  # experts' matrices, of ShapeDtypeStructs
) -> ExpertsChoice:
    """Returns the platform's kernel where it takes every matrix, else the reference and why."""
    if requested == "reference" or device.platform == "cpu":  # nobody misses a kernel
        return ExpertsChoice(backend="reference", warning=None)
    own = _KERNELS.get(device.platform)
    if own is None:
        reason = f"there is none for a {device.platform}"
    elif (refused := device_refusal(own, device)) is not None:
        reason = refused
    elif refusals := [refusal for weight in weights if (refusal := _refusal(weight)) is not None]:
        reason = refusals[0]
    else:
        return ExpertsChoice(backend=own, warning=None)
    warning = f"experts run on the slower reference, not on a kernel: {reason}"
    return ExpertsChoice(backend="reference", warning=warning)


def _refusal(weight: ExpertWeight) -> str | None:
    """Returns why kernels do not take a matrix: they want floats, or bytes with a scale a row."""
    if not isinstance(weight, QuantizedWeight):
        return None
    name, (groups, scales) = weight.data.dtype.name, weight.scale.shape[1:]
    if weight.data.dtype.itemsize != 1 or weight.data.dtype == jnp.int4:
        return f"it takes no {name}"
    if (groups, scales) != (1, weight.data.shape[1]):
        return f"it takes {name} with one scale a row, not {groups} x {scales} scales a matrix"
    if weight.zero is not None or weight.order is not None:
        return f"it takes no {name} with zeros or with columns in another order"
    return None


class Routing(NamedTuple):
    """The experts of each token, the likeliest first."""

    experts: jax.Array  # [tokens, top_k] i32
    weights: jax.Array  # [tokens, top_k] f32, what their results are multiplied by


class Sorted(NamedTuple):
    """Pairs of a token and one of its experts, by expert; pairs of no expert here come last."""

    tokens: jax.Array  # [pairs] i32
    places: jax.Array  # [tokens, top_k] i32, where each token's pairs are
    sizes: jax.Array  # [experts] i32, pairs of each


def router_logits(
    x: jax.Array,  # [tokens, hidden]
    weight: jax.Array,  # [experts, hidden]
) -> jax.Array:  # [tokens, experts] f32
    """Returns the router's logits, in full float32: a rounded one may choose another expert."""
    return lax.dot_general(
        x.astype(jnp.float32),
        weight.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )


def route(
    logits: jax.Array,  # [tokens, experts] f32
    top_k: int,
    *,
    is_renormalized: bool,
) -> Routing:
    """Returns each token's likeliest experts and their probabilities, as a softmax over all gives.

    Renormalised, a token's weights sum to 1: the same as a softmax over the logits of its own.
    """
    weights, experts = lax.top_k(jax.nn.softmax(logits, axis=-1), top_k)
    if is_renormalized:
        weights = weights / weights.sum(-1, keepdims=True)
    return Routing(experts=experts, weights=weights)


def mix_experts(
    x: jax.Array,  # [tokens, hidden]
    routing: Routing,
    gate: ExpertWeight,  # [experts, ffw, hidden], of the experts here
    up: ExpertWeight,  # [experts, ffw, hidden]
    down: ExpertWeight,  # [experts, hidden, ffw]
    *,
    first_expert: jax.Array | int,  # the number of the first expert here
    num_tokens: jax.Array | int,  # real ones: the rest are padding, and get zeros
    activation: Callable[[jax.Array], jax.Array],
    backend: Backend,
) -> jax.Array:  # [tokens, hidden] f32
    """Returns the weighted sum of what each token's experts make of it; others' count nothing."""
    num_experts = (gate.data if isinstance(gate, QuantizedWeight) else gate).shape[0]
    pairs = sort_by_expert(routing.experts, first_expert, num_experts, num_tokens)
    rows = x[pairs.tokens]
    with jax.named_scope("experts"):
        gated = activation(expert_matmul(rows, gate, pairs.sizes, backend, rows.dtype))
        inner = gated * expert_matmul(rows, up, pairs.sizes, backend, rows.dtype)
        out = expert_matmul(inner, down, pairs.sizes, backend, jnp.float32)
    return (out[pairs.places] * routing.weights[:, :, None]).sum(1)


def sort_by_expert(
    experts: jax.Array,  # [tokens, top_k] i32
    first_expert: jax.Array | int,
    num_experts: int,  # here
    num_tokens: jax.Array | int,
) -> Sorted:
    """Returns the pairs of real tokens and experts here, by expert, and within it by token."""
    tokens, top_k = experts.shape
    local = experts - first_expert
    is_real = (jnp.arange(tokens, dtype=jnp.int32) < num_tokens)[:, None]
    is_here = is_real & (local >= 0) & (local < num_experts)
    local = jnp.where(is_here, local, num_experts).reshape(-1)
    order = jnp.argsort(local, stable=True).astype(jnp.int32)
    pair = jnp.arange(tokens * top_k, dtype=jnp.int32)
    places = jnp.zeros_like(pair).at[order].set(pair, unique_indices=True)
    expert = jnp.arange(num_experts, dtype=jnp.int32)
    sizes = (local[:, None] == expert[None]).sum(0, dtype=jnp.int32)
    return Sorted(tokens=order // top_k, places=places.reshape(tokens, top_k), sizes=sizes)


def expert_matmul(
    rows: jax.Array,  # [rows, in], sorted by expert
    weight: ExpertWeight,  # [experts, out, in]
    sizes: jax.Array,  # [experts] i32, rows of each
    backend: Backend,
    dtype: jax.typing.DTypeLike,  # of the result
) -> jax.Array:  # [rows, out]
    """Returns each row times its expert's matrix, transposed; zeros for rows of none."""
    if not isinstance(weight, QuantizedWeight):
        return grouped_matmul(rows, weight, sizes, backend=backend, out_dtype=dtype)
    if backend != "reference":
        assert _refusal(weight) is None, weight
        scale = weight.scale[:, 0].astype(jnp.float32)
        return grouped_matmul(rows, weight.data, sizes, scale, backend=backend, out_dtype=dtype)

    def multiply(tile: jax.Array, expert: jax.Array) -> jax.Array:
        return multiply_quantized(tile, jax.tree.map(lambda leaf: entry_of(leaf, expert), weight))

    return multiply_by_tiles(rows, sizes, weight.data.shape[1], multiply).astype(dtype)
