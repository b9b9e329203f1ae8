"""What the device remembers for each slot in order to sample, and how it is admitted and updated.

Every update takes the state and returns it; donated, it is written in place. A slot number equal
to the number of slots marks a padding row: it is never written, and reads as a greedy row.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.ops import vocab


class Float(enum.IntEnum):
    """Columns of `SamplingState.floats`."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    TYPICAL_P = 3
    PRESENCE = 4
    FREQUENCY = 5
    REPETITION = 6


class Int(enum.IntEnum):
    """Columns of `SamplingState.ints`."""

    TOP_K = 0  # 0: off
    SEED_HIGH = 1  # upper and lower halves of the 64-bit seed
    SEED_LOW = 2
    MIN_TOKENS = 3
    NUM_OUTPUT = 4  # tokens generated so far
    NUM_LOGPROBS = 5  # -1: none; 0: of the chosen token alone
    OPTIONS = 6  # bits of `Option`


class Option(enum.IntFlag):
    """Options of a slot whose values are the wide arrays of `SamplingState`."""

    NONE = 0
    LOGIT_BIAS = 1
    ALLOWED_TOKENS = 2
    BAD_WORDS = 4
    GRAMMAR = 8
    LOGPROB_TOKENS = 16  # the first of `bias_tokens` are reported in place of the likeliest


# Greedy, and every option off.
_OFF_FLOATS = np.array([0, 1, 0, 1, 0, 0, 1], np.float32)
_OFF_INTS = np.array([0, 0, 0, 0, 0, -1, 0], np.int32)


@flax.struct.dataclass
class SamplingState:
    """Sampling parameters and history of every slot."""

    floats: jax.Array  # [slots, len(Float)] f32
    ints: jax.Array  # [slots, len(Int)] i32
    output_counts: jax.Array  # [slots, vocab part] i32, kept only for slots with penalties
    in_prompt: jax.Array  # [slots, vocab part] bool, kept only for slots with penalties
    bias_tokens: jax.Array  # [slots, bias] i32, padded with vocab
    bias_values: jax.Array  # [slots, bias] f32
    allowed: jax.Array  # [slots, ceil(vocab / 32)] u32, bit t % 32 of word t // 32
    grammar: jax.Array  # [slots, ceil(vocab / 32)] u32
    bad_words: jax.Array  # [slots, words, word_tokens] i32, right-aligned, padded with -1
    recent: jax.Array  # [slots, word_tokens - 1] i32, newest output last, padded with -1
    stop_tokens: jax.Array  # [slots, stops] i32, not before MIN_TOKENS; padded with vocab

    @property
    def num_slots(self) -> int:
        return self.floats.shape[0]


@flax.struct.dataclass
class SamplingRows:
    """The rows of one step's logits. Padding rows have slot == num_slots."""

    slots: jax.Array  # [rows] i32
    positions: jax.Array  # [rows] i32, index in the sequence of the token to be chosen
    targets: jax.Array  # [rows] i32, token of a prompt-logprob row; -1: choose a token


@flax.struct.dataclass
class WideParams:
    """The values of `Option`s, `min_tokens` and past outputs, for slots that need them."""

    bias_tokens: jax.Array  # [admitted, bias] i32
    bias_values: jax.Array  # [admitted, bias] f32
    allowed: jax.Array  # [admitted, ceil(vocab / 32)] u32
    bad_words: jax.Array  # [admitted, words, word_tokens] i32
    recent: jax.Array  # [admitted, word_tokens - 1] i32
    stop_tokens: jax.Array  # [admitted, stops] i32


class RowParams(NamedTuple):
    """The narrow parameters of each row of a step; rows that choose no token read as greedy."""

    floats: jax.Array  # [rows, len(Float)] f32
    ints: jax.Array  # [rows, len(Int)] i32

    def float(self, column: Float) -> jax.Array:  # [rows] f32
        return self.floats[:, column]

    def int(self, column: Int) -> jax.Array:  # [rows] i32
        return self.ints[:, column]

    def has(self, option: Option) -> jax.Array:  # [rows] bool
        return (self.ints[:, Int.OPTIONS] & option.value) != 0

    @property
    def is_random(self) -> jax.Array:  # [rows] bool
        return self.floats[:, Float.TEMPERATURE] >= 1e-5

    @property
    def has_penalties(self) -> jax.Array:  # [rows] bool
        return _has_penalties(self.floats)

    @property
    def is_masked(self) -> jax.Array:  # [rows] bool
        return self.has(Option.ALLOWED_TOKENS | Option.GRAMMAR)

    @property
    def is_biased(self) -> jax.Array:  # [rows] bool
        return self.has(Option.LOGIT_BIAS | Option.BAD_WORDS) | self.bans_stops

    @property
    def is_adjusted(self) -> jax.Array:  # [rows] bool
        return self.is_masked | self.is_biased | self.has_penalties

    @property
    def bans_stops(self) -> jax.Array:  # [rows] bool
        return self.ints[:, Int.NUM_OUTPUT] < self.ints[:, Int.MIN_TOKENS]


def init_sampling_state(
    num_slots: int,
    vocab_size: int,
    *,
    vocab_part: int | None = None,  # tokens whose counts this device keeps; default: all
    max_bias: int,
    max_bad_words: int,
    max_bad_word_tokens: int,
    max_stop_tokens: int,
) -> SamplingState:
    """Returns the state of empty slots."""
    words = -(-vocab_size // 32)
    vocab_part = vocab_size if vocab_part is None else vocab_part
    return SamplingState(
        floats=jnp.tile(_OFF_FLOATS, (num_slots, 1)),
        ints=jnp.tile(_OFF_INTS, (num_slots, 1)),
        output_counts=jnp.zeros((num_slots, vocab_part), jnp.int32),
        in_prompt=jnp.zeros((num_slots, vocab_part), jnp.bool_),
        bias_tokens=jnp.full((num_slots, max_bias), vocab_size, jnp.int32),
        bias_values=jnp.zeros((num_slots, max_bias), jnp.float32),
        allowed=jnp.zeros((num_slots, words), jnp.uint32),
        grammar=jnp.zeros((num_slots, words), jnp.uint32),
        bad_words=jnp.full((num_slots, max_bad_words, max_bad_word_tokens), -1, jnp.int32),
        recent=jnp.full((num_slots, max_bad_word_tokens - 1), -1, jnp.int32),
        stop_tokens=jnp.full((num_slots, max_stop_tokens), vocab_size, jnp.int32),
    )


def pack_narrow(
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    min_tokens: int = 0,
    num_output: int = 0,
    num_logprobs: int | None = None,
    options: Option = Option.NONE,
) -> tuple[np.ndarray, np.ndarray]:  # [len(Float)] f32, [len(Int)] i32
    """Returns one slot's row of `floats` and of `ints`; on the host. `top_k` <= 0 is off."""
    floats = (
        temperature,
        top_p,
        min_p,
        typical_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
    )
    halves = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32).view(np.int32)
    logprobs = -1 if num_logprobs is None else num_logprobs
    ints = (max(top_k, 0), *halves, min_tokens, num_output, logprobs, options.value)
    return np.array(floats, np.float32), np.array(ints, np.int32)


def admit_narrow(
    state: SamplingState,  # donated
    slots: jax.Array,  # [admitted] i32, padded with num_slots
    floats: jax.Array,  # [admitted, len(Float)] f32
    ints: jax.Array,  # [admitted, len(Int)] i32
) -> SamplingState:
    """Writes the narrow parameters of new slots and clears their history.

    Counts are cleared only for slots with penalties, one row at a time: others never read them.
    """
    # Penalised slots first: the loop's trip count is then their number.
    is_counted = (slots < state.num_slots) & _has_penalties(floats)
    counted = slots[jnp.argsort(~is_counted, stable=True)]
    zero_counts = jnp.zeros((1, state.output_counts.shape[1]), jnp.int32)

    def clear(i: jax.Array, history: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        counts, in_prompt = history
        start = (counted[i], jnp.int32(0))
        return (
            lax.dynamic_update_slice(counts, zero_counts, start),
            lax.dynamic_update_slice(in_prompt, zero_counts.astype(jnp.bool_), start),
        )

    counts, in_prompt = lax.fori_loop(
        0, is_counted.sum(dtype=jnp.int32), clear, (state.output_counts, state.in_prompt)
    )
    return dataclasses.replace(
        state,
        floats=state.floats.at[slots].set(floats, mode="drop"),
        ints=state.ints.at[slots].set(ints, mode="drop"),
        recent=state.recent.at[slots].set(-1, mode="drop"),
        output_counts=counts,
        in_prompt=in_prompt,
    )


def admit_wide(
    state: SamplingState,  # donated
    slots: jax.Array,  # [admitted] i32, padded with num_slots
    wide: WideParams,
) -> SamplingState:
    """Writes the wide parameters of new slots; after `admit_narrow`, which forgets `recent`."""
    return dataclasses.replace(
        state,
        **{
            name: getattr(state, name).at[slots].set(getattr(wide, name), mode="drop")
            for name in WideParams.__dataclass_fields__
        },
    )


def set_grammar(
    state: SamplingState,  # donated
    slots: jax.Array,  # [rows] i32, padded with num_slots
    masks: jax.Array,  # [rows, ceil(vocab / 32)] u32
) -> SamplingState:
    """Writes the tokens that the grammar allows next, for slots with `Option.GRAMMAR`."""
    return dataclasses.replace(state, grammar=state.grammar.at[slots].set(masks, mode="drop"))


def load_history(
    state: SamplingState,  # donated
    slots: jax.Array,  # [history] i32, padded with num_slots
    tokens: jax.Array,  # [history] i32
    is_output: jax.Array,  # [history] bool; False for prompt tokens
) -> SamplingState:
    """Adds known tokens to the counts of newly admitted slots with penalties."""
    outputs = jnp.where(is_output, slots, state.num_slots)
    prompts = jnp.where(is_output, state.num_slots, slots)
    # The TPU compiler scatters into a flat copy. Of bytes it takes minutes to make one, of words
    # not; the barrier keeps it from turning them into bytes before they are rows again.
    tokens = vocab.local_tokens(tokens, state.output_counts.shape[1])
    in_prompt = state.in_prompt.astype(jnp.int32).at[prompts, tokens].set(1, mode="drop")
    return dataclasses.replace(
        state,
        output_counts=state.output_counts.at[outputs, tokens].add(1, mode="drop"),
        in_prompt=lax.optimization_barrier(in_prompt) != 0,
    )


def record_tokens(
    state: SamplingState,  # donated
    rows: SamplingRows,
    tokens: jax.Array,  # [rows] i32, as chosen
) -> SamplingState:
    """Adds the chosen tokens to their slots' history. A slot may have one choosing row."""
    num_slots = state.num_slots
    slots = jnp.where(rows.targets < 0, rows.slots, num_slots)
    clipped = jnp.minimum(slots, num_slots - 1)
    counted = jnp.where(_has_penalties(state.floats[clipped]), slots, num_slots)
    recent = jnp.concatenate([state.recent[clipped], tokens[:, None]], axis=1)[:, 1:]
    local = vocab.local_tokens(tokens, state.output_counts.shape[1])
    return dataclasses.replace(
        state,
        ints=state.ints.at[slots, Int.NUM_OUTPUT].add(1, mode="drop"),
        recent=state.recent.at[slots].set(recent, mode="drop"),
        output_counts=state.output_counts.at[counted, local].add(1, mode="drop"),
    )


def row_params(state: SamplingState, rows: SamplingRows) -> RowParams:
    """Returns the narrow parameters of the rows; those that choose no token are greedy."""
    is_choosing = (rows.slots < state.num_slots) & (rows.targets < 0)
    slots = clip_slots(state, rows)
    # jnp.where broadcasts ranks only when told to.
    keep = is_choosing[:, None]
    return RowParams(
        floats=jnp.where(keep, state.floats[slots], _OFF_FLOATS[None]),
        ints=jnp.where(keep, state.ints[slots], _OFF_INTS[None]),
    )


def clip_slots(state: SamplingState, rows: SamplingRows) -> jax.Array:  # [rows] i32
    """Returns slots that are safe to read; a padding row reads the last slot."""
    return jnp.minimum(rows.slots, state.num_slots - 1)


def _has_penalties(
    floats: jax.Array,  # [rows, len(Float)] f32
) -> jax.Array:  # [rows] bool
    return (
        (floats[:, Float.PRESENCE] != 0)
        | (floats[:, Float.FREQUENCY] != 0)
        | (floats[:, Float.REPETITION] != 1)
    )
