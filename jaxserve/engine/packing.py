"""Turns a plan into the arrays that one step uploads: a small blob, and extras when needed.

A `Layout` names the parts of a flat int32 array once, for the host that fills them and the step
that reads them. Host only, but for numpy: imports no jax.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
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

Parts = dict[str, np.ndarray]  # of one rank's upload, by name, as `Layout.split` returns them


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes that every step shares, of one rank where nothing else is said."""

    num_slots: int
    pages_per_sequence: int
    page_size: int
    vocab_size: int
    max_model_len: int
    max_step_tokens: int
    max_wide: int = 4  # admissions with lists of tokens, in one step
    num_ranks: int = 1  # of the data axis

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

    @cached_property
    def _places(self) -> tuple[tuple[str, slice, tuple[int, ...]], ...]:
        stops = list(itertools.accumulate(math.prod(shape) for _, shape in self.parts))
        starts = [0, *stops[:-1]]
        return tuple(
            (name, slice(start, stop), shape)
            for (name, shape), start, stop in zip(self.parts, starts, stops, strict=True)
        )

    def split(self, flat: Any) -> dict[str, Any]:
        """Returns each part, shaped; views of a numpy array, slices of a traced one."""
        return {name: flat[place].reshape(shape) for name, place, shape in self._places}


@lru_cache(maxsize=64)  # every step asks for one of its few buckets'
def blob_layout(limits: Limits, num_tokens: int, num_rows: int) -> Layout:
    """Returns one rank's blob, of a step of the bucket (`num_tokens`, `num_rows`)."""
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


@lru_cache(maxsize=16)
def extras_layout(limits: Limits) -> Layout:
    """Returns one rank's second upload, for steps that admit sequences with lists of tokens."""
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
    blob: np.ndarray  # [ranks, blob_layout.size] i32
    extras: np.ndarray | None  # [ranks, extras_layout.size] i32
    spans: tuple[Span, ...]  # in plan order
    places: tuple[tuple[int, int], ...]  # (rank, first row of logits) of each span


def pack(plan: StepPlan, limits: Limits, buckets: tuple[tuple[int, int], ...]) -> Packed:
    """Returns the arrays of a plan in the smallest bucket that holds it on every rank."""
    num_tokens, num_rows = bucket_for(plan, buckets)
    blob = empty_blob(limits, num_tokens, num_rows)
    layout = blob_layout(limits, num_tokens, num_rows)
    ranks = [layout.split(part) for part in blob]
    places = _pack_spans(ranks, plan.spans)
    _pack_grants(ranks, plan, limits)
    _pack_admitted(ranks, plan.admitted)
    _flag_grammars(ranks, plan)
    extras = _pack_extras(ranks, plan.admitted, limits)
    return Packed(
        num_tokens=num_tokens,
        num_rows=num_rows,
        blob=blob,
        extras=extras,
        spans=plan.spans,
        places=places,
    )


def empty_blob(
    limits: Limits, num_tokens: int, num_rows: int
) -> np.ndarray:  # [ranks, blob_layout.size] i32
    """Returns the blob of a step that computes nothing: padding everywhere."""
    layout = blob_layout(limits, num_tokens, num_rows)
    blob = np.zeros((limits.num_ranks, layout.size), np.int32)
    parts = layout.split(blob[0])
    for name in ("sequence_slots", "row_slots", "admitted_slots"):
        parts[name].fill(limits.num_slots)
    parts["row_targets"].fill(-1)
    parts["grant_places"].fill(limits.num_slots * limits.pages_per_sequence)
    blob[1:] = blob[0]
    return blob


def bucket_for(plan: StepPlan, buckets: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Returns the first of the sorted (tokens, rows) buckets that holds the plan on every rank.

    A bucket with as many rows as tokens takes one-token sequences only.
    """
    rows = max(plan.num_rows, plan.num_sequences)
    is_single = all(span.count == 1 for span in plan.spans[plan.num_decode :])
    for num_tokens, num_rows in buckets:
        fits = plan.num_tokens <= num_tokens and rows <= num_rows
        if fits and (is_single or num_rows < num_tokens):
            return num_tokens, num_rows
    raise AssertionError(f"{plan.num_tokens=} {rows=} exceed {buckets=}")


def _pack_spans(ranks: list[Parts], spans: tuple[Span, ...]) -> tuple[tuple[int, int], ...]:
    """Writes the spans; returns each one's rank and first row of logits."""
    singles: list[list[int]] = [[] for _ in ranks]
    longer: list[list[int]] = [[] for _ in ranks]
    for index, span in enumerate(spans):
        rank = span.sequence.rank
        assert rank is not None
        (singles if span.count == 1 else longer)[rank].append(index)
    places = [(0, 0)] * len(spans)
    for rank, parts in enumerate(ranks):
        order = singles[rank] + longer[rank]
        if not order:
            continue
        parts["counts"][:] = len(singles[rank]), len(order)
        first_rows = _pack_rank(parts, [spans[index] for index in order])
        for index, row in zip(order, first_rows, strict=True):
            places[index] = rank, row
    return tuple(places)


def _pack_rank(parts: Parts, spans: list[Span]) -> list[int]:
    """Writes one rank's spans, in this order; returns each span's first row of logits."""
    first_rows: list[int] = []
    slots, lens, takes, ends = [], [], [], []
    row_tokens: list[int] = []
    row_slots, row_targets = [], []
    tokens = parts["tokens"]
    token = 0
    for sequence, start, count, samples, takes_device_token, num_rows in spans:
        if not takes_device_token:
            tokens[token : token + count] = sequence.tokens[start : start + count]
        slots.append(sequence.slot)
        lens.append(start + count)
        takes.append(takes_device_token)
        first_rows.append(len(row_tokens))
        for offset in range(count - num_rows, count):
            chooses = samples and offset == count - 1
            row_tokens.append(token + offset)
            row_slots.append(sequence.slot)
            row_targets.append(-1 if chooses else sequence.tokens[start + offset + 1])
        token += count
        ends.append(token)
    num_spans, num_rows = len(spans), len(row_tokens)
    # One write for each part: a write for each value would take most of the packing's time.
    parts["sequence_slots"][:num_spans] = slots
    parts["kv_lens"][:num_spans] = lens
    parts["takes_device_token"][:num_spans] = takes
    parts["cu_q_lens"][1 : num_spans + 1] = ends
    parts["cu_q_lens"][num_spans + 1 :] = token
    parts["row_tokens"][:num_rows] = row_tokens
    parts["row_slots"][:num_rows] = row_slots
    parts["row_targets"][:num_rows] = row_targets
    return first_rows


def _pack_grants(ranks: list[Parts], plan: StepPlan, limits: Limits) -> None:
    counts = [0] * len(ranks)
    for sequence, first_index, granted in plan.grants:
        assert sequence.rank is not None and sequence.slot is not None
        parts, count = ranks[sequence.rank], counts[sequence.rank]
        first = sequence.slot * limits.pages_per_sequence + first_index
        stop = count + len(granted)
        parts["grant_places"][count:stop] = np.arange(first, first + len(granted))
        parts["grant_pages"][count:stop] = granted
        counts[sequence.rank] = stop


def _flag_grammars(ranks: list[Parts], plan: StepPlan) -> None:
    """Says in the blobs which ranks read masks."""
    if not plan.has_grammar:
        return
    for span in plan.spans:
        if span.samples and span.sequence.matcher is not None:
            assert span.sequence.rank is not None
            ranks[span.sequence.rank]["has_grammar"][0] = 1


def _pack_admitted(ranks: list[Parts], admitted: tuple[Sequence, ...]) -> None:
    counts = [0] * len(ranks)
    for sequence in admitted:
        assert sequence.rank is not None
        parts, row = ranks[sequence.rank], counts[sequence.rank]
        parts["admitted_slots"][row] = sequence.slot
        floats, ints = narrow_params(sequence)
        parts["admitted_floats"][row] = floats.view(np.int32)
        parts["admitted_ints"][row] = ints
        counts[sequence.rank] += 1


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
            -1 if params.logprobs is None else num_top_logprobs(params),
            _options(params),
        ),
        np.int32,
    )
    return floats, ints


def num_top_logprobs(params: SamplingParams) -> int:
    """Returns how many tokens beside the chosen one a position of the answer reports."""
    return len(params.logprob_token_ids or ()) or params.logprobs or 0


def _options(params: SamplingParams) -> int:
    """Returns the bits of ops.sampling_state.Option; jax-free, so spelled out here."""
    bias = 1 if params.logit_bias else 0
    allowed = 2 if params.allowed_token_ids is not None else 0
    bad_words = 4 if params.bad_word_tokens else 0
    grammar = 8 if params.grammar is not None else 0
    logprob_tokens = 16 if params.logprob_token_ids else 0
    return bias | allowed | bad_words | grammar | logprob_tokens


def _pack_extras(
    ranks: list[Parts], admitted: tuple[Sequence, ...], limits: Limits
) -> np.ndarray | None:  # [ranks, extras_layout.size] i32
    """Returns the second upload, if any rank needs it, and says in the blobs which ranks do."""
    if not admitted:
        return None
    layout = extras_layout(limits)
    extras = None
    for rank, blob_parts in enumerate(ranks):
        members = [sequence for sequence in admitted if sequence.rank == rank]
        wide = [sequence for sequence in members if sequence.is_wide]
        counted = [sequence for sequence in members if sequence.request.params.has_penalties]
        if not wide and not counted:
            continue
        blob_parts["has_extras"][0] = 1
        if extras is None:
            extras = empty_extras(limits)
        parts = layout.split(extras[rank])
        for row, sequence in enumerate(wide):
            _pack_wide({name: part[row] for name, part in parts.items()}, sequence, limits)
            parts["wide_slots"][row] = sequence.slot
        _pack_history(parts, counted)
    return extras


def empty_extras(limits: Limits) -> np.ndarray:  # [ranks, extras_layout.size] i32
    """Returns a second upload that tells nothing of any slot."""
    layout = extras_layout(limits)
    extras = np.zeros((limits.num_ranks, layout.size), np.int32)
    parts = layout.split(extras[0])
    parts["wide_slots"].fill(limits.num_slots)
    parts["history_slots"].fill(limits.num_slots)
    extras[1:] = extras[0]
    return extras


def _pack_history(parts: Parts, counted: list[Sequence]) -> None:
    count = 0
    for sequence in counted:
        stop = count + len(sequence.tokens)
        parts["history_slots"][count:stop] = sequence.slot
        parts["history_tokens"][count:stop] = sequence.tokens
        parts["history_is_output"][count + sequence.num_prompt : stop] = 1
        count = stop


def _pack_wide(row: Parts, sequence: Sequence, limits: Limits) -> None:
    params = sequence.request.params
    row["bias_tokens"].fill(limits.vocab_size)
    # Tokens whose logprobs were asked for lead the list; most of them are biased by nothing.
    biases = dict.fromkeys(params.logprob_token_ids or (), 0.0) | (params.logit_bias or {})
    if biases:
        row["bias_tokens"][: len(biases)] = list(biases)
        values = np.array(list(biases.values()), np.float32)
        row["bias_values"][: len(biases)] = values.view(np.int32)
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
