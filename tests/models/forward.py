"""Runs a model of a checkpoint on one sequence, without an engine."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.batch import Batch
from jaxserve.mesh import mesh_for
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.loading import abstract_model, load_params
from pallas_kernels.ragged_paged_attention import layout_for

PAGE_SIZE = 4


def logits_of(
    path: Path, tokens: list[int], *, chunks: tuple[int, ...]
) -> np.ndarray:  # [tokens, vocab] f32
    """Returns the logits after each token, computed `chunks` tokens at a time through pages."""
    return Forward(path, max_tokens=len(tokens)).logits(tokens, chunks=chunks)


class Forward:
    """A loaded model in float32; a program is compiled once for each size of chunk."""

    def __init__(self, path: Path, *, max_tokens: int) -> None:
        float32 = jnp.dtype(jnp.float32)
        with open_checkpoint(path) as checkpoint:
            model = abstract_model(
                checkpoint.config, mesh_for("1"), dtype=float32, activation_dtype=float32
            )
            self._params = load_params(model, checkpoint, lambda done, total: None)
        layout = layout_for(
            "reference",
            page_size=PAGE_SIZE,
            kv_heads=model.config.num_kv_heads,
            head_dim=model.config.head_dim,
            dtype=float32,
        )
        self._num_pages = -(-max_tokens // PAGE_SIZE)
        # Junk, which must stay unseen.
        self._cache = tuple(
            tuple(
                jnp.full(leaf.shape, 1e3, leaf.dtype) for leaf in layout.shapes(self._num_pages + 3)
            )
            for _ in range(model.config.num_layers)
        )

        @jax.jit
        def forward(params, batch, cache):
            module = nnx.merge(model.graph, jax.tree.unflatten(model.tree, params))
            hidden, cache = module(batch, cache)
            return module.logits(hidden), cache

        self._forward = forward

    def logits(
        self, tokens: list[int], *, chunks: tuple[int, ...]
    ) -> np.ndarray:  # [tokens, vocab] f32
        """Returns the logits after each token, computed `chunks` tokens at a time."""
        pages = np.random.default_rng(0).permutation(self._num_pages + 3)[: self._num_pages]
        cache, rows, start = self._cache, [], 0
        for count in chunks:
            batch = Batch(
                tokens=jnp.asarray(tokens[start : start + count], jnp.int32),
                positions=jnp.arange(start, start + count, dtype=jnp.int32),
                kv_lens=jnp.array([start + count], jnp.int32),
                page_table=jnp.asarray(pages.astype(np.int32)[None]),
                cu_q_lens=jnp.array([0, count], jnp.int32),
                counts=jnp.array([count == 1, 1], jnp.int32),
                attention="reference",
            )
            logits, cache = self._forward(self._params, batch, cache)
            rows.append(np.asarray(logits))
            start += count
        assert start == len(tokens)
        return np.concatenate(rows)
