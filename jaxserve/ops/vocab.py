"""Exact searches along a vocabulary axis: argmax, top-k and mass thresholds, none by a full sort.

A row is seen as blocks of 128 tokens. Reductions inside a block are wide and cheap on every
backend; what follows sees one number per block.

Each device of a mesh holds its part of the vocabulary, in whole blocks. Tokens are numbered over
all of it, and every device gets the same answer, bit for bit: loops and conds depend on them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.ops.parallel import gather_along, index_along, parts_along

BLOCK_TOKENS = 128  # lanes of a TPU vector register; 64 to 256 measured alike on CPU


def to_blocks(
    logits: jax.Array,  # [rows, vocab] f32
) -> jax.Array:  # [rows, blocks, BLOCK_TOKENS] f32, -inf past the vocabulary
    """Returns the rows cut into blocks, padded with tokens that cannot be chosen."""
    rows, vocab = logits.shape
    padding = -vocab % BLOCK_TOKENS
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return logits.reshape(rows, -1, BLOCK_TOKENS)


def first_token(
    num_tokens: int,  # of each device's part
) -> jax.Array:  # [] i32
    """Returns the number of the first token that this device holds."""
    return index_along("vocab") * num_tokens


def local_tokens(
    tokens: jax.Array,  # any shape, i32
    num_tokens: int,  # of each device's part
) -> jax.Array:  # same shape; num_tokens for those of other devices, and for what is no token
    """Returns where this device holds the tokens, to be read or scattered with mode="drop"."""
    if parts_along("vocab") == 1:
        return tokens
    local = tokens - first_token(num_tokens)
    return jnp.where((local >= 0) & (local < num_tokens), local, num_tokens)


def total(
    x: jax.Array,  # any shape, each device's sum over its tokens
) -> jax.Array:  # same shape
    """Returns the sum over all tokens."""
    return gather_along(x, "vocab").sum(0)


def largest(
    x: jax.Array,  # any shape, each device's maximum over its tokens
) -> jax.Array:  # same shape
    """Returns the maximum over all tokens."""
    return gather_along(x, "vocab").max(0)


def smallest(
    x: jax.Array,  # any shape, each device's minimum over its tokens
) -> jax.Array:  # same shape
    """Returns the minimum over all tokens."""
    return gather_along(x, "vocab").min(0)


def take_block(
    blocks: jax.Array,  # [rows, blocks, BLOCK_TOKENS]
    block: jax.Array,  # [rows] i32
) -> jax.Array:  # [rows, BLOCK_TOKENS]
    """Returns one block of each row; the device's last where it has no such block."""
    block = jnp.minimum(block, blocks.shape[1] - 1)
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def argmax(
    blocks: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32
) -> tuple[jax.Array, jax.Array]:  # [rows] i32, [rows] f32
    """Returns the first largest token of each row, and its value.

    `jnp.argmax` over the whole vocabulary is a scalar loop on CPU, ten times slower than this.
    """
    block_max = blocks.max(2)
    block = jnp.argmax(block_max, axis=1).astype(jnp.int32)
    values = take_block(blocks, block)
    inside = jnp.argmax(values, axis=1).astype(jnp.int32)
    # Not block_max.max(1): XLA fuses that into a second pass over the vocabulary.
    token, value = block * BLOCK_TOKENS + inside, values.max(1)
    if parts_along("vocab") == 1:
        return token, value
    tokens = gather_along(token + first_token(blocks.shape[1] * BLOCK_TOKENS), "vocab")
    parts = gather_along(value, "vocab")  # [parts, rows]
    best = jnp.argmax(parts, axis=0)[None]
    return jnp.take_along_axis(tokens, best, axis=0)[0], parts.max(0)


def top_k(
    blocks: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32
    k: int,
) -> tuple[jax.Array, jax.Array]:  # [rows, k] f32, [rows, k] i32
    """Returns the `k` largest values and their tokens, as `lax.top_k` over the row would."""
    num_tokens = blocks.shape[1] * BLOCK_TOKENS
    values, tokens = _local_top_k(blocks, min(k, num_tokens))
    if parts_along("vocab") == 1:
        return values, tokens
    # Devices in vocabulary order, so that ties go to the smaller token here too.
    all_values, all_tokens = (
        jnp.moveaxis(gather_along(part, "vocab"), 0, 1).reshape(part.shape[0], -1)
        for part in (values, tokens + first_token(num_tokens))
    )
    values, index = _top_k(all_values, k)
    return values, jnp.take_along_axis(all_tokens, index, axis=1)


def _local_top_k(
    blocks: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32
    k: int,
) -> tuple[jax.Array, jax.Array]:  # [rows, k] f32, [rows, k] i32
    """Returns the device's own `k` largest, its tokens numbered from 0.

    Only the `k` blocks with the largest maxima can hold them: a token outside those blocks has k
    tokens at or above it. The chosen blocks are read in vocabulary order, so that ties go to the
    smaller token.
    """
    rows, num_blocks, _ = blocks.shape
    if k >= num_blocks:  # every block would be chosen
        return _top_k(blocks.reshape(rows, -1), k)
    _, chosen = lax.top_k(blocks.max(2), k)
    chosen = jnp.sort(chosen, axis=1)
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1)
    values, index = _top_k(candidates.reshape(rows, -1), k)
    block = jnp.take_along_axis(chosen, index // BLOCK_TOKENS, axis=1)
    return values, block * BLOCK_TOKENS + index % BLOCK_TOKENS


def _top_k(
    x: jax.Array,  # [rows, n] f32
    k: int,
) -> tuple[jax.Array, jax.Array]:  # [rows, k] f32, [rows, k] i32
    # XLA's CPU backend sorts the whole row, 30 times slower, where a caller drops the indices:
    # reading the values through them keeps them.
    _, index = lax.top_k(x, k)
    return jnp.take_along_axis(x, index, axis=1), index


def bisect_threshold(
    keys: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32, no NaN
    log_weights: jax.Array | None,  # same shape; None: every token weighs 1
    target: jax.Array,  # [rows] f32
    low: jax.Array,  # [rows] f32; the answer where nothing larger reaches the target
    high: jax.Array,  # [rows] f32; the answer is at most this
) -> jax.Array:  # [rows] f32
    """Returns the largest t in [low, high] where tokens of keys >= t weigh `target` or more.

    Exact to the bit: it bisects the bit patterns of floats, which are ordered like the floats, in
    at most 32 passes, 26 for the usual bounds. Rows with low >= high are answered `low` and are
    not read: the open ones are gathered an eighth of the rows at a time.
    """
    rows = keys.shape[0]
    chunk = max(1, rows // 8)
    order = jnp.argsort(low >= high, stable=True).astype(jnp.int32)
    num_open = (low < high).sum(dtype=jnp.int32)

    def solve(i: jax.Array, answer: jax.Array) -> jax.Array:
        # The last chunk may repeat a row or hold closed ones: their answers do not change.
        chosen = order[jnp.minimum(i * chunk + jnp.arange(chunk, dtype=jnp.int32), rows - 1)]
        weights = None if log_weights is None else jnp.exp(log_weights[chosen])
        bounds = (answer[chosen], jnp.maximum(high, low)[chosen])
        return answer.at[chosen].set(_bisect(keys[chosen], weights, target[chosen], *bounds))

    return lax.fori_loop(0, -(-num_open // chunk), solve, low)


def _bisect(
    keys: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32
    weights: jax.Array | None,  # same shape
    target: jax.Array,  # [rows] f32
    low: jax.Array,  # [rows] f32
    high: jax.Array,  # [rows] f32, not below `low`
) -> jax.Array:  # [rows] f32
    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        lower, upper = bounds
        middle = (lower & upper) + ((lower ^ upper) >> 1)  # the mean, without overflow
        is_above = keys >= _from_ordered(middle)[:, None, None]
        # A float count is exact below 2^24 and vectorises where integers do not.
        mass = total(jnp.where(is_above, 1.0 if weights is None else weights, 0.0).sum((1, 2)))
        is_open = lower + 1 < upper
        is_reached = mass >= target
        return (
            jnp.where(is_open & is_reached, middle, lower),
            jnp.where(is_open & ~is_reached, middle, upper),
        )

    def any_open(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(bounds[0] + 1 < bounds[1])

    # Invariant: `lower` reaches the target (or is `low`), `upper` does not.
    lower, _ = lax.while_loop(any_open, halve, (_to_ordered(low), _to_ordered(high) + 1))
    return _from_ordered(lower)


def _to_ordered(
    x: jax.Array,  # f32
) -> jax.Array:  # i32, in the order of x
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered(
    ordered: jax.Array,  # i32
) -> jax.Array:  # f32
    return lax.bitcast_convert_type(ordered ^ ((ordered >> 31) & 0x7FFFFFFF), jnp.float32)
