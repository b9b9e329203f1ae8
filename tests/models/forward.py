"""Runs a model of a checkpoint on one sequence, without an engine."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.batch import Batch, ScaledCache
from jaxserve.engine.kv_scales import kv_scales_for
from jaxserve.mesh import mesh_for
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.loading import abstract_model, load_params, stored_formats
from pallas_kernels.ragged_paged_attention import layout_for

FLOAT32 = jnp.dtype(jnp.float32)


def logits_of(
    path: Path,
    tokens: list[int],
    *,
    chunks: tuple[int, ...],
    quantization: str = "auto",
    kv_dtype: jnp.dtype = FLOAT32,
    page_size: int = 4,
) -> np.ndarray:  # [tokens, vocab] f32
    """Returns the logits after each token, computed `chunks` tokens at a time through pages."""
    with open_checkpoint(path) as checkpoint:
        model = abstract_model(
            checkpoint.config,
            mesh_for("1"),
            dtype=FLOAT32,
            activation_dtype=FLOAT32,
            quantization=quantization,
            formats=stored_formats(checkpoint),
        )
        params = load_params(model, checkpoint, lambda done, total: None)
        scales = kv_scales_for(model, params, checkpoint, kv_dtype)
    config = model.config
    layout = layout_for(
        "reference",
        page_size=page_size,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=kv_dtype,
    )
    num_pages = -(-len(tokens) // page_size)
    cache = tuple(
        tuple(jnp.full(leaf.shape, 1e3).astype(leaf.dtype) for leaf in layout.shapes(num_pages + 3))
        for _ in range(config.num_layers)
    )
    if scales is not None:
        cache = tuple(
            ScaledCache(pages=pages, k_scale=pair[0], v_scale=pair[1])
            for pages, pair in zip(cache, jnp.asarray(scales), strict=True)
        )
    pages = np.random.default_rng(0).permutation(num_pages + 3)[:num_pages].astype(np.int32)

    @jax.jit
    def forward(params, batch, cache):
        module = nnx.merge(model.graph, jax.tree.unflatten(model.tree, params))
        hidden, cache = module(batch, cache)
        return module.logits(hidden), cache

    rows, start = [], 0
    for count in chunks:
        position = np.arange(start, start + count, dtype=np.int32)
        batch = Batch(
            tokens=jnp.asarray(tokens[start : start + count], jnp.int32),
            positions=jnp.asarray(position),
            kv_lens=jnp.array([start + count], jnp.int32),
            page_table=jnp.asarray(pages[None]),
            cu_q_lens=jnp.array([0, count], jnp.int32),
            counts=jnp.array([count == 1, 1], jnp.int32),
            attention="reference",
        )
        logits, cache = forward(params, batch, cache)
        rows.append(np.asarray(logits))
        start += count
    assert start == len(tokens)
    return np.concatenate(rows)
