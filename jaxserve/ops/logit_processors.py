"""What changes logits before a token is chosen: masks, bias, bans and penalties.

The order is vLLM's: allowed tokens and grammar, bias, `min_tokens`, bad words, then penalties.
Each part costs nothing in a step where no row asks for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.ops import vocab
from jaxserve.ops.sampling_state import (
    Float,
    Option,
    RowParams,
    SamplingRows,
    SamplingState,
    clip_slots,
)

_NO_TOKEN = 2**30  # past any vocabulary: dropped where it is scattered


def adjust_logits(
    logits: jax.Array,  # [rows, vocab] f32
    state: SamplingState,
    rows: SamplingRows,
    params: RowParams,
) -> jax.Array:  # [rows, vocab] f32
    """Returns the logits that greedy rows take the argmax of and random rows sample from."""
    slots = clip_slots(state, rows)

    # One cond around them all: a step without any of them copies the logits at most once.
    def adjust() -> jax.Array:
        adjusted = lax.cond(
            params.is_masked.any(),
            lambda: mask_tokens(logits, state, slots, params),
            lambda: logits,
        )
        adjusted = lax.cond(
            params.is_biased.any(),
            lambda: bias_tokens(adjusted, state, slots, params),
            lambda: adjusted,
        )
        return lax.cond(
            params.has_penalties.any(),
            lambda: penalize_tokens(adjusted, state, slots, params),
            lambda: adjusted,
        )

    return lax.cond(params.is_adjusted.any(), adjust, lambda: logits)


def mask_tokens(
    logits: jax.Array,  # [rows, vocab] f32
    state: SamplingState,
    slots: jax.Array,  # [rows] i32
    params: RowParams,
) -> jax.Array:  # [rows, vocab] f32
    """Returns logits of -inf for tokens that `allowed_token_ids` or the grammar leave out."""
    everything = jnp.uint32(0xFFFFFFFF)
    has_allowed = params.has(Option.ALLOWED_TOKENS)[:, None]
    has_grammar = params.has(Option.GRAMMAR)[:, None]
    allowed = jnp.where(has_allowed, state.allowed[slots], everything)
    allowed &= jnp.where(has_grammar, state.grammar[slots], everything)
    # Words of the whole vocabulary, of which a device reads those of its part.
    words = -(-logits.shape[1] // 32)
    first_word = vocab.first_token(logits.shape[1]) // 32
    allowed = lax.dynamic_slice_in_dim(allowed, first_word, words, axis=1)
    bit = jnp.arange(32, dtype=jnp.uint32)[None, None]
    bits = (allowed[:, :, None] >> bit) & 1  # [rows, words, 32]
    is_allowed = bits.reshape(logits.shape[0], -1)[:, : logits.shape[1]] == 1
    return jnp.where(is_allowed, logits, -jnp.inf)


def bias_tokens(
    logits: jax.Array,  # [rows, vocab] f32
    state: SamplingState,
    slots: jax.Array,  # [rows] i32
    params: RowParams,
) -> jax.Array:  # [rows, vocab] f32
    """Returns logits plus `logit_bias`, and -inf for stops before `min_tokens` and bad words."""
    has_bias = params.has(Option.LOGIT_BIAS)[:, None]
    stops = jnp.where(params.bans_stops[:, None], state.stop_tokens[slots], _NO_TOKEN)
    words = jnp.where(
        params.has(Option.BAD_WORDS)[:, None],
        _bad_word_ends(state.bad_words[slots], state.recent[slots]),
        _NO_TOKEN,
    )
    banned = jnp.concatenate([stops, words], axis=1)
    # One scatter: a ban is a bias of -inf, which no other bias can undo.
    biased = jnp.where(has_bias, state.bias_tokens[slots], _NO_TOKEN)
    tokens = jnp.concatenate([biased, banned], axis=1)
    values = jnp.concatenate(
        [state.bias_values[slots], jnp.full(banned.shape, -jnp.inf, logits.dtype)], axis=1
    )
    row = lax.broadcasted_iota(jnp.int32, tokens.shape, 0)
    tokens = vocab.local_tokens(tokens, logits.shape[1])
    return logits.at[row, tokens].add(values, mode="drop")


def _bad_word_ends(
    words: jax.Array,  # [rows, words, word_tokens] i32
    recent: jax.Array,  # [rows, word_tokens - 1] i32
) -> jax.Array:  # [rows, words] i32; _NO_TOKEN where outputs so far do not lead up to the word
    prefix, last = words[:, :, :-1], words[:, :, -1]
    # Padding in a prefix matches anything; padding in `recent` equals no token.
    matches = ((prefix == -1) | (prefix == recent[:, None])).all(2) & (last != -1)
    return jnp.where(matches, last, _NO_TOKEN)


def penalize_tokens(
    logits: jax.Array,  # [rows, vocab] f32
    state: SamplingState,
    slots: jax.Array,  # [rows] i32
    params: RowParams,
) -> jax.Array:  # [rows, vocab] f32
    """Returns logits after the repetition, frequency and presence penalties, in that order."""
    # Rows without penalties read stale counts; their neutral parameters cancel them.
    counts = state.output_counts[slots]
    is_output = counts > 0
    is_seen = is_output | state.in_prompt[slots]
    repetition = params.float(Float.REPETITION)[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(is_seen, repeated, logits)
    logits -= params.float(Float.FREQUENCY)[:, None] * counts.astype(logits.dtype)
    return logits - params.float(Float.PRESENCE)[:, None] * is_output.astype(logits.dtype)
