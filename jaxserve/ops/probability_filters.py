"""Which tokens min_p, top_k, top_p and typical_p keep, without sorting the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.ops import vocab
from jaxserve.ops.sampling_state import Float, Int, RowParams

# The most likely tokens, sorted, answer most rows; a row that needs more costs a bisection.
NUM_CANDIDATES = 64

# exp() of anything lower is 0 in float32: such a token is never drawn, kept or not.
_LOWEST = -128.0


def filter_bounds(
    scaled: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32, log(probability / the largest one)
    params: RowParams,
) -> tuple[jax.Array, jax.Array]:  # [rows] f32 each
    """Returns the lowest and the highest `scaled` that the filters keep.

    In the order min_p, top_k, top_p, typical_p, each on the renormalised rest of the one before
    (vLLM's order; Hugging Face's typical_p follows top_p too). Equal logits stay or go together.
    """
    min_p = jnp.where(params.is_random, params.float(Float.MIN_P), 0.0)
    top_k = jnp.where(params.is_random, params.int(Int.TOP_K), 0)
    top_p = jnp.where(params.is_random, params.float(Float.TOP_P), 1.0)
    typical_p = jnp.where(params.is_random, params.float(Float.TYPICAL_P), 1.0)
    low = jnp.log(min_p)  # log(0) is -inf: off
    low = lax.cond(
        ((top_k > 0) | (top_p < 1)).any(),
        lambda: _keep_top(scaled, low, top_k, top_p),
        lambda: low,
    )
    return lax.cond(
        (typical_p < 1).any(),
        lambda: _keep_typical(scaled, low, typical_p),
        lambda: (low, jnp.full_like(low, jnp.inf)),
    )


def _keep_top(
    scaled: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32
    low: jax.Array,  # [rows] f32
    top_k: jax.Array,  # [rows] i32, 0: off
    top_p: jax.Array,  # [rows] f32, 1: off
) -> jax.Array:  # [rows] f32
    """Returns `low` raised to what top_k and then top_p keep."""
    candidates, _ = vocab.top_k(scaled, NUM_CANDIDATES)
    low = _keep_top_k(scaled, candidates, low, top_k)
    return lax.cond(
        (top_p < 1).any(), lambda: _keep_top_p(scaled, candidates, low, top_p), lambda: low
    )


def _keep_top_k(
    scaled: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32
    candidates: jax.Array,  # [rows, NUM_CANDIDATES] f32, descending
    low: jax.Array,  # [rows] f32
    top_k: jax.Array,  # [rows] i32, 0: off
) -> jax.Array:  # [rows] f32
    last = candidates[:, -1]
    kth = _take(candidates, jnp.clip(top_k, 1, NUM_CANDIDATES) - 1)
    is_wide = top_k > NUM_CANDIDATES
    wide_low = jnp.where(is_wide, jnp.maximum(low, _LOWEST), kth)
    wide_high = jnp.where(is_wide, last, kth)
    count = top_k.astype(jnp.float32)
    kth = vocab.bisect_threshold(scaled, None, count, wide_low, wide_high)
    return jnp.where(top_k > 0, jnp.maximum(low, kth), low)


def _keep_top_p(
    scaled: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32
    candidates: jax.Array,  # [rows, NUM_CANDIDATES] f32, descending
    low: jax.Array,  # [rows] f32
    top_p: jax.Array,  # [rows] f32, 1: off
) -> jax.Array:  # [rows] f32
    """A token stays if the tokens that are more likely have less than `top_p` of the mass."""
    last = candidates[:, -1]
    is_kept = scaled >= low[:, None, None]
    target = top_p * vocab.total(jnp.where(is_kept, jnp.exp(scaled), 0.0).sum((1, 2)))
    masses = jnp.cumsum(jnp.where(candidates >= low[:, None], jnp.exp(candidates), 0.0), axis=1)
    # The first candidate has no mass before it: it always stays.
    num_kept = 1 + (masses[:, :-1] < target[:, None]).sum(1, dtype=jnp.int32)
    nucleus = _take(candidates, num_kept - 1)
    is_wide = (top_p < 1) & (masses[:, -1] < target) & (last > low)
    wide_low = jnp.where(is_wide, jnp.maximum(low, _LOWEST), nucleus)
    wide_high = jnp.where(is_wide, last, nucleus)
    nucleus = vocab.bisect_threshold(scaled, scaled, target, wide_low, wide_high)
    return jnp.where(top_p < 1, jnp.maximum(low, nucleus), low)


def _keep_typical(
    scaled: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32
    low: jax.Array,  # [rows] f32
    typical_p: jax.Array,  # [rows] f32, 1: off
) -> tuple[jax.Array, jax.Array]:  # [rows] f32 each
    """Keeps the tokens whose surprise is nearest to the expected one, up to `typical_p`.

    Locally typical sampling, https://arxiv.org/abs/2202.00666. The normalising constant cancels:
    |-log p - entropy| is the distance of `scaled` from its mean.
    """
    is_on = typical_p < 1
    log_weights = jnp.where(scaled >= low[:, None, None], scaled, -jnp.inf)
    weights = jnp.exp(log_weights)
    total = vocab.total(weights.sum((1, 2)))
    # 0 * -inf is NaN.
    mean = vocab.total(jnp.where(weights > 0, weights * scaled, 0.0).sum((1, 2))) / total
    nearness = jnp.where(weights > 0, -jnp.abs(scaled - mean[:, None, None]), -jnp.inf)
    furthest = jnp.where(is_on, _LOWEST, 0.0)
    threshold = vocab.bisect_threshold(
        nearness, log_weights, typical_p * total, furthest, jnp.zeros_like(total)
    )
    is_kept = nearness >= threshold[:, None, None]
    lowest = vocab.smallest(jnp.where(is_kept, scaled, jnp.inf).min((1, 2)))
    highest = vocab.largest(jnp.where(is_kept, scaled, -jnp.inf).max((1, 2)))
    return jnp.where(is_on, lowest, low), jnp.where(is_on, highest, jnp.inf)


def _take(
    candidates: jax.Array,  # [rows, candidates]
    index: jax.Array,  # [rows] i32
) -> jax.Array:  # [rows]
    return jnp.take_along_axis(candidates, index[:, None], axis=1)[:, 0]
