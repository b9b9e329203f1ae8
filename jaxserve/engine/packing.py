"""Turns a plan into the arrays that one step uploads: a small blob, and extras when needed.

A `Layout` names the parts of a flat int32 array once, for the host that fills them and the step
that reads them. Host only, but for numpy: imports no jax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxserve.engine.request import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_EOS_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKENS,
    SamplingParams,
)
from jaxserve.engine.sequence import Sequence, Span, StepPlan

NUM_FLOATS = 7  # of SamplingState.floats
NUM_INTS = 7  # of SamplingState.ints


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes that every step shares."""

    num_slots: int
    pages_per_sequence: int
    page_size: int
    vocab_size: int
    max_model_len: int
    max_step_tokens: int
    max_wide: int = 4  # admissions with lists of tokens, in one step

    @property
    def max_history(self) -> int:
        """Known tokens that one step may bring for penalties."""
        return self.max_model_len

    @property
    def max_grants(self) -> int:
        """Pages that one step can grant: an admission of full length always fits."""
        return self.pages_per_sequence + self.num_slots + self.max_step_tokens // self.page_size

    @property
    def mask_words(self) -> int:
        """Words of a bitmask over the vocabulary."""
        return -(-self.vocab_size // 32)


@dataclass(frozen=True)
class Layout:
    """Named parts of a flat int32 array, in order."""

    parts: tuple[tuple[str, tuple[int, ...]], ...]

    @cached_property
    def size(self) -> int:
        """The number of int32 values."""
        return sum(math.prod(shape) for _, shape in self.parts)

    def split(self, flat: Any) -> dict[str, Any]:
        """Returns each part, shaped; views of a numpy array, slices of a traced one."""
        views, start = {}, 0
        for name, shape in self.parts:
            stop = start + math.prod(shape)
            views[name] = flat[start:stop].reshape(shape)
            start = stop
        return views


def blob_layout(limits: Limits, num_tokens: int, num_rows: int) -> Layout:
    """Returns the blob of a step of the bucket (`num_tokens`, `num_rows`)."""
    rows = (num_rows,)
    grants = (limits.max_grants,)
    return Layout(
        (
            ("counts", (2,)),  # sequences of one token, all sequences
            ("has_extras", (1,)),
            ("has_grammar", (1,)),
            ("tokens", (num_tokens,)),
            ("kv_lens", rows),
            ("cu_q_lens", (num_rows + 1,)),
            ("sequence_slots", rows),
            ("takes_device_token", rows),
            ("row_tokens", rows),  # index into tokens of each row of logits
            ("row_slots", rows),  # num_slots for padding
            ("row_targets", rows),  # the token to score; -1 to choose one
            ("admitted_slots", rows),  # num_slots for padding
            ("admitted_floats", (num_rows, NUM_FLOATS)),  # f32 bits
            ("admitted_ints", (num_rows, NUM_INTS)),
            ("grant_places", grants),  # slot * pages_per_sequence + index; past the end: padding
            ("grant_pages", grants),
        )
    )


def extras_layout(limits: Limits) -> Layout:
    """Returns the second upload, for steps that admit a sequence with lists of tokens."""
    wide, history = limits.max_wide, (limits.max_history,)
    return Layout(
        (
            ("wide_slots", (wide,)),
            ("bias_tokens", (wide, MAX_LOGIT_BIAS)),
            ("bias_values", (wide, MAX_LOGIT_BIAS)),  # f32 bits
            ("allowed", (wide, limits.mask_words)),
            ("bad_words", (wide, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS)),
            ("recent", (wide, MAX_BAD_WORD_TOKENS - 1)),
            ("stop_tokens", (wide, MAX_STOP_TOKENS + MAX_EOS_TOKENS)),
            ("history_slots", history),
            ("history_tokens", history),
            ("history_is_output", history),
        )
    )


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One step's upload, and how to read what comes back."""

    num_tokens: int  # bucket
    num_rows: int  # bucket
    blob: np.ndarray  # [blob_layout.size] i32
    extras: np.ndarray | None  # [extras_layout.size] i32
    spans: tuple[Span, ...]  # in plan order
    first_rows: tuple[int, ...]  # of each span's rows of logits


def pack(plan: StepPlan, limits: Limits, buckets: tuple[tuple[int, int], ...]) -> Packed:
    """Returns the arrays of a plan in the smallest bucket that holds it."""
    num_tokens, num_rows = bucket_for(plan, buckets)
    blob = empty_blob(limits, num_tokens, num_rows)
    parts = blob_layout(limits, num_tokens, num_rows).split(blob)
    order = sorted(range(len(plan.spans)), key=lambda index: plan.spans[index].count > 1)
    parts["counts"][:] = sum(span.count == 1 for span in plan.spans), len(plan.spans)
    first_rows = _pack_spans(parts, plan.spans, order)
    _pack_grants(parts, plan, limits)
    for row, sequence in enumerate(plan.admitted):
        parts["admitted_slots"][row] = sequence.slot
        floats, ints = narrow_params(sequence)
        parts["admitted_floats"][row] = floats.view(np.int32)
        parts["admitted_ints"][row] = ints
    extras = _pack_extras(plan.admitted, limits)
    parts["has_extras"][0] = extras is not None
    return Packed(
        num_tokens=num_tokens,
        num_rows=num_rows,
        blob=blob,
        extras=extras,
        spans=plan.spans,
        first_rows=first_rows,
    )


def empty_blob(limits: Limits, num_tokens: int, num_rows: int) -> np.ndarray:  # [size] i32
    """Returns the blob of a step that computes nothing: padding everywhere."""
    layout = blob_layout(limits, num_tokens, num_rows)
    blob = np.zeros(layout.size, np.int32)
    parts = layout.split(blob)
    for name in ("sequence_slots", "row_slots", "admitted_slots"):
        parts[name].fill(limits.num_slots)
    parts["row_targets"].fill(-1)
    parts["grant_places"].fill(limits.num_slots * limits.pages_per_sequence)
    return blob


def bucket_for(plan: StepPlan, buckets: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Returns the first of the sorted (tokens, rows) buckets that holds the plan.

    A bucket with as many rows as tokens takes one-token sequences only.
    """
    rows = max(plan.num_rows, len(plan.spans))
    is_single = plan.num_tokens == len(plan.spans)
    for num_tokens, num_rows in buckets:
        fits = plan.num_tokens <= num_tokens and rows <= num_rows
        if fits and (is_single or num_rows < num_tokens):
            return num_tokens, num_rows
    raise AssertionError(f"{plan.num_tokens=} {rows=} exceed {buckets=}")


def _pack_spans(
    parts: dict[str, np.ndarray], spans: tuple[Span, ...], order: list[int]
) -> tuple[int, ...]:
    """Writes the spans, one-token ones first; returns each span's first row of logits."""
    first_rows = [0] * len(spans)
    token, row = 0, 0
    cu_q_lens = parts["cu_q_lens"]
    for place, index in enumerate(order):
        span = spans[index]
        sequence, start, count = span.sequence, span.start, span.count
        assert sequence.slot is not None
        if span.takes_device_token:
            parts["takes_device_token"][place] = 1
        else:
            parts["tokens"][token : token + count] = sequence.tokens[start : start + count]
        parts["sequence_slots"][place] = sequence.slot
        parts["kv_lens"][place] = start + count
        first_rows[index] = row
        for offset in range(count - span.num_rows, count):
            parts["row_tokens"][row] = token + offset
            parts["row_slots"][row] = sequence.slot
            if not (span.samples and offset == count - 1):
                parts["row_targets"][row] = sequence.tokens[start + offset + 1]
            row += 1
        token += count
        cu_q_lens[place + 1] = token
    cu_q_lens[len(spans) + 1 :] = token
    return tuple(first_rows)


def _pack_grants(parts: dict[str, np.ndarray], plan: StepPlan, limits: Limits) -> None:
    places, pages = parts["grant_places"], parts["grant_pages"]
    count = 0
    for sequence, first_index, granted in plan.grants:
        assert sequence.slot is not None
        first = sequence.slot * limits.pages_per_sequence + first_index
        stop = count + len(granted)
        places[count:stop] = np.arange(first, first + len(granted))
        pages[count:stop] = granted
        count = stop


def narrow_params(sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Returns a slot's rows of SamplingState.floats `[7] f32` and .ints `[7] i32`."""
    params = sequence.request.params
    floats = np.array(
        (
            params.temperature,
            params.top_p,
            params.min_p,
            params.typical_p,
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty,
        ),
        np.float32,
    )
    seed = (params.seed or 0) % 2**64
    halves = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32).view(np.int32)
    ints = np.array(
        (
            max(params.top_k, 0),
            *halves,
            params.min_tokens,
            len(sequence.tokens) - sequence.num_prompt,
            -1 if params.logprobs is None else params.logprobs,
            _options(params),
        ),
        np.int32,
    )
    return floats, ints


def _options(params: SamplingParams) -> int:
    """Returns the bits of ops.sampling_state.Option; jax-free, so spelled out here."""
    bias = 1 if params.logit_bias else 0
    allowed = 2 if params.allowed_token_ids is not None else 0
    bad_words = 4 if params.bad_word_tokens else 0
    return bias | allowed | bad_words


def _pack_extras(admitted: tuple[Sequence, ...], limits: Limits) -> np.ndarray | None:
    wide = [sequence for sequence in admitted if sequence.is_wide]
    counted = [sequence for sequence in admitted if sequence.request.params.has_penalties]
    if not wide and not counted:
        return None
    layout = extras_layout(limits)
    extras = np.zeros(layout.size, np.int32)
    parts = layout.split(extras)
    parts["wide_slots"].fill(limits.num_slots)
    parts["history_slots"].fill(limits.num_slots)
    for row, sequence in enumerate(wide):
        _pack_wide({name: part[row] for name, part in parts.items()}, sequence, limits)
        parts["wide_slots"][row] = sequence.slot
    count = 0
    for sequence in counted:
        stop = count + len(sequence.tokens)
        parts["history_slots"][count:stop] = sequence.slot
        parts["history_tokens"][count:stop] = sequence.tokens
        parts["history_is_output"][count + sequence.num_prompt : stop] = 1
        count = stop
    return extras


def _pack_wide(row: dict[str, np.ndarray], sequence: Sequence, limits: Limits) -> None:
    params = sequence.request.params
    row["bias_tokens"].fill(limits.vocab_size)
    if params.logit_bias:
        count = len(params.logit_bias)
        row["bias_tokens"][:count] = list(params.logit_bias)
        values = np.array(list(params.logit_bias.values()), np.float32)
        row["bias_values"][:count] = values.view(np.int32)
    if params.allowed_token_ids is not None:
        bits = np.zeros(limits.mask_words * 32, np.uint8)
        bits[list(params.allowed_token_ids)] = 1
        row["allowed"][:] = np.packbits(bits, bitorder="little").view(np.int32)
    row["bad_words"].fill(-1)
    for index, word in enumerate(params.bad_word_tokens):
        row["bad_words"][index, -len(word) :] = word
    row["recent"].fill(-1)
    outputs = sequence.tokens[sequence.num_prompt :][-len(row["recent"]) :]
    if outputs:
        row["recent"][-len(outputs) :] = outputs
    row["stop_tokens"].fill(limits.vocab_size)
    stops = sorted(sequence.end_tokens)
    row["stop_tokens"][: len(stops)] = stops
