"""Ragged batches on scattered pages among junk, and what attention makes of them, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """Arguments of the attention contract, with pages as plain keys and values.

    A backend's test packs `keys` and `values` into that backend's layout.
    """

    q: np.ndarray  # [tokens, heads, head_dim] f32
    k: np.ndarray  # [tokens, kv_heads, head_dim] f32
    v: np.ndarray  # [tokens, kv_heads, head_dim] f32
    keys: np.ndarray  # [pages, page_size, kv_heads, head_dim] f32, before the step
    values: np.ndarray  # [pages, page_size, kv_heads, head_dim] f32
    kv_lens: np.ndarray  # [sequences] i32
    page_table: np.ndarray  # [sequences, pages_per_sequence] i32
    cu_q_lens: np.ndarray  # [sequences + 1] i32
    counts: np.ndarray  # [2] i32
    written: np.ndarray  # [rows, 2] i32, page and offset where each real token's row belongs

    @property
    def num_rows(self) -> int:
        """Rows of q that belong to a sequence."""
        return int(self.cu_q_lens[-1])

    def tables(self) -> tuple[np.ndarray, ...]:
        """Returns the contract's arguments after the cache."""
        return self.kv_lens, self.page_table, self.cu_q_lens, self.counts

    def cache_after(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns keys and values with the step's own rows written."""
        keys, values = self.keys.copy(), self.values.copy()
        pages, offsets = self.written.T
        keys[pages, offsets] = self.k[: self.num_rows]
        values[pages, offsets] = self.v[: self.num_rows]
        return keys, values

    def expected(self, **options: Any) -> np.ndarray:  # [rows, heads, head_dim] f64
        """Returns dense attention over each sequence's own rows; options as the contract's."""
        keys, values = self.cache_after()
        outputs = []
        for index in range(int(self.counts[1])):
            kv_len, page_size = int(self.kv_lens[index]), keys.shape[1]
            pages = self.page_table[index, : -(-kv_len // page_size)]
            k, v = (side[pages].reshape(-1, *side.shape[2:])[:kv_len] for side in (keys, values))
            q = self.q[self.cu_q_lens[index] : self.cu_q_lens[index + 1]]
            outputs.append(dense_attention(q, k, v, **options))
        return np.concatenate(outputs)


def ragged_batch(
    lens: Sequence[tuple[int, int]],  # (q_len, kv_len) of each sequence, those of one token first
    *,
    tokens: int,
    sequences: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 16,
    pages_per_sequence: int = 40,
    num_pages: int | None = None,  # default: one more than the sequences need
    dtype: Any = np.float32,  # numbers are rounded to it, and kept as float32
    junk: float = np.nan,  # in every row that no sequence has written
    seed: int = 0,
) -> RaggedBatch:
    """Returns a batch of random numbers. Padding of the page table points at a page of junk."""
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(dtype).astype(np.float32)

    if num_pages is None:
        num_pages = 1 + sum(-(-kv_len // page_size) for _, kv_len in lens)
    order = list(random.permutation(num_pages))
    keys, values = (
        np.full((num_pages, page_size, kv_heads, head_dim), junk, np.float32) for _ in range(2)
    )
    kv_lens = np.zeros(sequences, np.int32)
    cu_q_lens = np.zeros(sequences + 1, np.int32)
    tables, written = [], []
    for index, (q_len, kv_len) in enumerate(lens):
        pages = np.array([order.pop() for _ in range(-(-kv_len // page_size))], np.int32)
        positions = np.arange(kv_len)
        rows = np.stack([pages[positions // page_size], positions % page_size], axis=1)
        old = rows[: kv_len - q_len]
        for side in (keys, values):
            side[old[:, 0], old[:, 1]] = normal(len(old), kv_heads, head_dim)
        written.append(rows[kv_len - q_len :])
        tables.append(pages)
        kv_lens[index] = kv_len
        cu_q_lens[index + 1 :] = cu_q_lens[index] + q_len
    page_table = np.full((sequences, pages_per_sequence), order[0], np.int32)
    for index, pages in enumerate(tables):
        page_table[index, : len(pages)] = pages
    return RaggedBatch(
        q=normal(tokens, heads, head_dim),
        k=normal(tokens, kv_heads, head_dim),
        v=normal(tokens, kv_heads, head_dim),
        keys=keys,
        values=values,
        kv_lens=kv_lens,
        page_table=page_table,
        cu_q_lens=cu_q_lens,
        counts=np.array([sum(q_len == 1 for q_len, _ in lens), len(lens)], np.int32),
        written=np.concatenate(written).astype(np.int32),
    )


def dense_attention(
    q: np.ndarray,  # [q_len, heads, head_dim], at the end of the context
    k: np.ndarray,  # [kv_len, kv_heads, head_dim]
    v: np.ndarray,  # [kv_len, kv_heads, head_dim]
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,  # [heads]
) -> np.ndarray:  # [q_len, heads, head_dim]
    """Attends in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = np.einsum("qhd,chd->hqc", q.astype(np.float64), k.astype(np.float64)) * scale
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    query = np.arange(len(k) - len(q), len(k))[:, None]
    key = np.arange(len(k))[None, :]
    seen = key <= query
    if sliding_window is not None:
        seen &= key > query - sliding_window
    logits = np.where(seen, logits, -np.inf)
    if sinks is not None:
        column = np.broadcast_to(sinks[:, None, None], (*logits.shape[:2], 1))
        logits = np.concatenate([logits, column], axis=2)
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("hqc,chd->qhd", weight[:, :, : len(k)], v)
