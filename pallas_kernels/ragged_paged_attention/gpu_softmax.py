"""A softmax over blocks of keys, as the GPU kernels carry it from block to block: plain values."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30  # finite: the difference of two is 0, not NaN
LOG2E = math.log2(math.e)


class Softmax(NamedTuple):
    """The running state of a softmax over blocks of keys (https://arxiv.org/abs/1805.02867)."""

    peak: jax.Array  # [rows] f32, largest logit so far, times log2(e)
    total: jax.Array  # [rows] f32, sum of exp2(logit - peak)
    value: jax.Array  # [rows, head_dim] f32, the same sum weighted by values


def across(column: jax.Array, width: int) -> jax.Array:  # [rows] -> [rows, width]
    """Returns one number a row, repeated over the row."""
    return lax.broadcast_in_dim(column, (column.shape[0], width), (0,))


def sink_total(peak: jax.Array) -> jax.Array:  # [rows] f32, logits of sinks -> [rows] f32
    """Returns the sum of weights before any key: a sink is a key without a value."""
    return jnp.where(peak > MASKED, jnp.ones_like(peak), jnp.zeros_like(peak))


def weigh(
    state: Softmax,
    logits: jax.Array,  # [rows, block_kv] f32, times log2(e)
) -> tuple[Softmax, jax.Array]:
    """Returns the state rescaled for a block of keys (their values still to add), and weights.

    A row that has seen no key yet gets weights of 1, which the first key it sees rescales to 0.
    """
    peak = jnp.maximum(state.peak, logits.max(axis=1))
    kept = jnp.exp2(state.peak - peak)
    weight = jnp.exp2(logits - across(peak, logits.shape[1]))
    total = state.total * kept + weight.sum(axis=1)
    value = state.value * across(kept, state.value.shape[1])
    return Softmax(peak, total, value), weight


def merge(
    state: Softmax,
    part: Softmax,  # of other keys
) -> Softmax:
    """Returns the softmax over the keys of both."""
    width = state.value.shape[1]
    peak = jnp.maximum(state.peak, part.peak)
    kept, weight = jnp.exp2(state.peak - peak), jnp.exp2(part.peak - peak)
    value = state.value * across(kept, width)
    value += part.value * across(weight, width)
    return Softmax(peak, state.total * kept + part.total * weight, value)


def finish(state: Softmax) -> jax.Array:  # [rows, head_dim] f32
    """Returns the weighted mean of the values; zeros for a row that saw no key."""
    share = 1.0 / jnp.maximum(state.total, 1e-30)
    return state.value * across(share, state.value.shape[1])
