"""Runs a model of a checkpoint on one sequence, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.batch import Batch, ScaledCache
from jaxserve.engine.kv_scales import kv_scales_for
from jaxserve.mesh import mesh_of_one
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.loading import abstract_model, load_params, stored_formats
from pallas_kernels.ragged_paged_attention import layout_for

FLOAT32 = jnp.dtype(jnp.float32)


class Forward:
    """A loaded model that computes in float32; each size of chunk is compiled once."""

    def __init__(
        self,
        path: Path,
        *,
        max_tokens: int,
        quantization: str = "auto",
        kv_dtype: jnp.dtype = FLOAT32,
        page_size: int = 4,
    ) -> None:
        with open_checkpoint(path) as checkpoint:
            model = abstract_model(
                checkpoint.config,
                mesh_of_one(),
                dtype=FLOAT32,
                activation_dtype=FLOAT32,
                quantization=quantization,
                formats=stored_formats(checkpoint),
            )
            self._params = load_params(model, checkpoint, lambda done, total: None)
            scales = kv_scales_for(model, self._params, checkpoint, kv_dtype)
        config = model.config
        self._vocab_size = config.vocab_size
        layout = layout_for(
            "reference",
            page_size=page_size,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=kv_dtype,
        )
        num_pages = -(-max_tokens // page_size)
        shapes = layout.shapes(num_pages + 3)
        cache = tuple(  # junk, which must stay unseen
            tuple(jnp.full(leaf.shape, 1e3).astype(leaf.dtype) for leaf in shapes)
            for _ in range(config.num_layers)
        )
        if scales is not None:
            cache = tuple(
                ScaledCache(pages=pages, k_scale=pair[0], v_scale=pair[1])
                for pages, pair in zip(cache, jnp.asarray(scales), strict=True)
            )
        self._cache = cache
        pages = np.random.default_rng(0).permutation(num_pages + 3)[:num_pages]
        self._page_table = jnp.asarray(pages.astype(np.int32)[None])

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
        cache, rows, start = self._cache, [], 0
        for count in chunks:
            position = np.arange(start, start + count, dtype=np.int32)
            batch = Batch(
                tokens=jnp.asarray(tokens[start : start + count], jnp.int32),
                positions=jnp.asarray(position),
                kv_lens=jnp.array([start + count], jnp.int32),
                page_table=self._page_table,
                cu_q_lens=jnp.array([0, count], jnp.int32),
                counts=jnp.array([count == 1, 1], jnp.int32),
                attention="reference",
                experts="reference",
            )
            logits, cache = self._forward(self._params, batch, cache)
            rows.append(np.asarray(logits)[:, : self._vocab_size])
            start += count
        assert start == len(tokens)
        return np.concatenate(rows)


def logits_of(
    path: Path, tokens: list[int], *, chunks: tuple[int, ...], **options: Any
) -> np.ndarray:  # [tokens, vocab] f32
    """Returns the logits after each token, computed `chunks` tokens at a time through pages."""
    return Forward(path, max_tokens=len(tokens), **options).logits(tokens, chunks=chunks)
