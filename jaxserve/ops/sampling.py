"""Chooses the next token of each row and reports log-probabilities, inside the step program.

Every option is data: what a step's rows do not ask for is skipped by `lax.cond`. A row's token
depends on its own logits, parameters, seed and position alone, never on the rest of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.ops import vocab
from jaxserve.ops.logit_processors import adjust_logits
from jaxserve.ops.parallel import gather_along, parts_along
from jaxserve.ops.probability_filters import filter_bounds
from jaxserve.ops.sampling_state import (
    Float,
    Int,
    Option,
    RowParams,
    SamplingRows,
    SamplingState,
    clip_slots,
    row_params,
)

_MAX_LISTED = 128  # tokens whose logprobs a request may ask for by id


class Report(NamedTuple):
    """What the host reads of a step's rows: `read_report` of `sample`'s second result."""

    tokens: np.ndarray  # [rows] i32, of a prompt-logprob row its own target
    logprobs: np.ndarray  # [rows] f32
    ranks: np.ndarray  # [rows] i32, 1 is the most likely
    top_tokens: np.ndarray  # [rows, max_logprobs] i32, most likely first
    top_logprobs: np.ndarray  # [rows, max_logprobs] f32


def sample(
    logits: jax.Array,  # [rows, vocab] f32; in a mesh, this device's part of the vocabulary
    state: SamplingState,
    rows: SamplingRows,
    *,
    max_logprobs: int,
) -> tuple[jax.Array, jax.Array]:  # [rows] i32, [rows, 3 + 2 * max_logprobs] i32
    """Returns each row's token, and what the host reads of it.

    The host's part is one array, for one copy; `read_report` takes it apart. Log-probabilities
    are of the logits as given, before any option; what no row of the step asked for is 0.
    """
    params = row_params(state, rows)
    with jax.named_scope("choose"):
        chosen = lax.cond(
            (params.is_adjusted | params.is_random).any(),
            lambda: choose_tokens(adjust_logits(logits, state, rows, params), rows, params),
            # Greedy rows without options: no more than an argmax.
            lambda: vocab.argmax(vocab.to_blocks(logits))[0],
        )
    tokens = jnp.where(rows.targets < 0, chosen, rows.targets)
    with jax.named_scope("logprobs"):
        is_target = (rows.targets >= 0) & (rows.slots < state.num_slots)
        num_logprobs = params.int(Int.NUM_LOGPROBS)
        report = _report_logprobs(
            logits,
            tokens,
            is_asked=(is_target | (num_logprobs >= 0)).any(),
            is_top_asked=(is_target | (num_logprobs > 0)).any(),
            listed=state.bias_tokens[clip_slots(state, rows), : min(max_logprobs, _MAX_LISTED)],
            is_listed=params.has(Option.LOGPROB_TOKENS),
            max_logprobs=max_logprobs,
        )
    return tokens, jnp.concatenate([tokens[:, None], report], axis=1)


def read_report(
    report: np.ndarray,  # [rows, 3 + 2 * max_logprobs] i32
) -> Report:
    """Returns the columns of a report; on the host, without copying."""
    floats = report.view(np.float32)
    first = 3 + (report.shape[1] - 3) // 2
    return Report(report[:, 0], floats[:, 1], report[:, 2], report[:, 3:first], floats[:, first:])


def choose_tokens(
    logits: jax.Array,  # [rows, vocab] f32, adjusted
    rows: SamplingRows,
    params: RowParams,
) -> jax.Array:  # [rows] i32
    """Returns the most likely token of greedy rows and a drawn one for rows with temperature."""
    blocks = vocab.to_blocks(logits)
    greedy, largest = vocab.argmax(blocks)

    def draw() -> jax.Array:
        temperature = jnp.where(params.is_random, params.float(Float.TEMPERATURE), 1.0)
        # A row without any finite logit must not become NaN everywhere.
        largest_finite = jnp.where(jnp.isfinite(largest), largest, 0.0)
        scaled = (blocks - largest_finite[:, None, None]) * (1 / temperature)[:, None, None]
        low, high = filter_bounds(scaled, params)
        drawn = _draw(scaled, low, high, uniforms(rows, params), greedy)
        return jnp.where(params.is_random, drawn, greedy)

    return lax.cond(params.is_random.any(), draw, lambda: greedy)


def uniforms(
    rows: SamplingRows, params: RowParams
) -> tuple[jax.Array, jax.Array]:  # [rows] f32 each, in [0, 1)
    """Returns two random numbers that depend on the row's seed and position only."""
    seeds = lax.bitcast_convert_type(params.ints[:, Int.SEED_HIGH : Int.SEED_LOW + 1], jnp.uint32)
    keys = jax.random.wrap_key_data(seeds, impl="threefry2x32")
    # The folded key is the cipher's output, 64 bits that nothing else uses: no second hash.
    bits = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, rows.positions))
    unit = (bits >> 8).astype(jnp.float32) * 2.0**-24
    return unit[:, 0], unit[:, 1]


def _draw(
    scaled: jax.Array,  # [rows, blocks, BLOCK_TOKENS] f32, largest is 0
    low: jax.Array,  # [rows] f32
    high: jax.Array,  # [rows] f32
    units: tuple[jax.Array, jax.Array],  # [rows] f32
    otherwise: jax.Array,  # [rows] i32, for rows without any probability
) -> jax.Array:  # [rows] i32
    """Returns a token of each row by the inverse of its cumulative distribution.

    One number picks the block and one the token inside it: a single 24-bit number is too coarse
    for tokens of probability 1e-7, and noise for every token of the vocabulary costs far more.
    """
    num_blocks = scaled.shape[1]
    own_totals = jnp.where(_is_kept(scaled, low, high), jnp.exp(scaled), 0.0).sum(2)
    totals = jnp.moveaxis(gather_along(own_totals, "vocab"), 0, 1).reshape(scaled.shape[0], -1)
    block = _invert(totals, units[0])
    own_block = vocab.local_tokens(block, num_blocks)  # blocks are divided as tokens are
    inside = vocab.take_block(scaled, own_block)
    is_kept = _is_kept(inside[:, None], low, high)[:, 0]
    token = _invert(jnp.where(is_kept, jnp.exp(inside), 0.0), units[1])
    if parts_along("vocab") > 1:  # one device holds the block
        token = vocab.largest(jnp.where(own_block < num_blocks, token, 0))
    drawn = block * vocab.BLOCK_TOKENS + token
    return jnp.where(totals.sum(1) > 0, drawn, otherwise)


def _is_kept(scaled: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return (scaled >= low[:, None, None]) & (scaled <= high[:, None, None])


def _invert(
    weights: jax.Array,  # [rows, n] f32, not negative
    unit: jax.Array,  # [rows] f32, in [0, 1)
) -> jax.Array:  # [rows] i32
    """Returns the index whose share of the cumulative weight holds `unit`; its weight is not 0."""
    index = lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    cumulative = jnp.cumsum(weights, axis=1)
    is_past = (cumulative > unit[:, None] * cumulative[:, -1:]) & (weights > 0)
    last = jnp.where(weights > 0, index, 0).max(1)  # where rounding leaves none past
    return jnp.minimum(jnp.where(is_past, index, weights.shape[1]).min(1), last)


def _report_logprobs(
    logits: jax.Array,  # [rows, vocab] f32
    tokens: jax.Array,  # [rows] i32
    *,
    is_asked: jax.Array,  # [] bool
    is_top_asked: jax.Array,  # [] bool
    listed: jax.Array,  # [rows, max_logprobs or fewer] i32, reported instead of the likeliest
    is_listed: jax.Array,  # [rows] bool
    max_logprobs: int,
) -> jax.Array:  # [rows, 2 + 2 * max_logprobs] i32
    """Returns the bits of the log-probability, the rank, and the most likely tokens."""
    rows = logits.shape[0]

    def report() -> jax.Array:
        blocks = vocab.to_blocks(logits)
        largest = vocab.largest(blocks.max((1, 2)))
        total = vocab.total(jnp.exp(blocks - largest[:, None, None]).sum((1, 2)))
        log_total = largest + jnp.log(total)
        own = _logits_of(logits, tokens[:, None])
        # Counting in float32 is exact below 2^24 and vectorises where integers do not.
        num_larger = vocab.total(jnp.where(logits > own, 1.0, 0.0).sum(1))
        rank = 1 + num_larger.astype(jnp.int32)
        columns = [_bits(own - log_total[:, None]), rank[:, None]]
        if max_logprobs:
            columns.append(lax.cond(is_top_asked, lambda: top(blocks, log_total), no_top))
        return jnp.concatenate(columns, axis=1)

    def top(blocks: jax.Array, log_total: jax.Array) -> jax.Array:
        top_tokens, values = lax.cond(is_listed.any(), with_listed, likeliest, blocks)
        return jnp.concatenate([top_tokens, _bits(values - log_total[:, None])], axis=1)

    def likeliest(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, top_tokens = vocab.top_k(blocks, max_logprobs)
        return top_tokens, values

    def with_listed(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
        top_tokens, values = likeliest(blocks)
        count = listed.shape[1]
        is_own = is_listed[:, None]
        own = _logits_of(logits, listed)
        return (
            top_tokens.at[:, :count].set(jnp.where(is_own, listed, top_tokens[:, :count])),
            values.at[:, :count].set(jnp.where(is_own, own, values[:, :count])),
        )

    def no_top() -> jax.Array:
        return jnp.zeros((rows, 2 * max_logprobs), jnp.int32)

    return lax.cond(is_asked, report, lambda: jnp.zeros((rows, 2 + 2 * max_logprobs), jnp.int32))


def _logits_of(
    logits: jax.Array,  # [rows, vocab] f32
    tokens: jax.Array,  # [rows, n] i32
) -> jax.Array:  # [rows, n] f32
    num_tokens = logits.shape[1]
    local = vocab.local_tokens(tokens, num_tokens)
    values = jnp.take_along_axis(logits, jnp.minimum(local, num_tokens - 1), axis=1)
    if parts_along("vocab") == 1:
        return values
    return vocab.largest(jnp.where(local < num_tokens, values, -jnp.inf))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)
