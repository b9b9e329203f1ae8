"""Finds the scales of an 8-bit KV cache: the checkpoint's, or what a run of the model shows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.batch import Batch, Cache, ScaledCache
from jaxserve.mesh import num_parts, put as put_on
from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.checkpoint.kv_scales import read_kv_peaks
from jaxserve.models.loading import AbstractModel
from pallas_kernels.ragged_paged_attention import layout_for

_NUM_TOKENS = 256
# What random tokens show is less than what text does: of 1.25 to 3, this margin, over a channel's
# own peak and no less than the layer's median, cost the perplexity of SmolLM2 and Qwen2.5 least.
_MARGIN = 2.5
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 448.0}


def kv_scales_for(
    model: AbstractModel,
    params: tuple[jax.Array, ...],
    checkpoint: Checkpoint,
    dtype: jnp.dtype,  # of the KV cache
) -> np.ndarray | None:  # [layers, 2, kv_heads, head_dim] f32, of keys and values
    """Returns each channel's scales; None for a cache that has none.

    float8 reaches far enough to store keys and values as they are: without the checkpoint's word
    its scales are 1. int8 has 127 steps, so that its scales must fit each channel.
    """
    if dtype.itemsize > 1:
        return None
    config = model.config
    peaks = read_kv_peaks(checkpoint, config.num_layers)
    if peaks is not None:  # of whole layers
        peaks = peaks[:, :, None, None]
    elif dtype != jnp.int8:
        peaks = np.full((1, 1, 1, 1), _LARGEST[dtype.name], np.float32)
    else:
        peaks = measured_peaks(model, params)
        typical = np.median(peaks, axis=(2, 3), keepdims=True)
        peaks = np.maximum(peaks, typical) * np.float32(_MARGIN)
    shape = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
    scales = np.broadcast_to(peaks / np.float32(_LARGEST[dtype.name]), shape)
    return np.maximum(scales, np.float32(1e-6))


def with_scales(
    cache: Cache,
    scales: np.ndarray,  # [layers, 2, kv_heads, head_dim] f32, of keys and values
) -> Cache:
    """Returns a cache of 8-bit numbers with these scales, on the devices of those it had."""

    def put(scale: np.ndarray, had: jax.Array) -> jax.Array:
        sharding: Any = had.sharding  # a NamedSharding, as the step's
        mesh = sharding.mesh
        parts = num_parts(mesh, "kv_heads")
        # Every rank, every copy: one part for each device, in the order of the mesh.
        shape = (num_parts(mesh, "rank"), parts, mesh.size // num_parts(mesh, "rank") // parts)
        split = scale.reshape(parts, -1, scale.shape[1])
        whole = np.broadcast_to(split[None, :, None], (*shape, *split.shape[1:]))
        return put_on(whole.reshape(had.shape), sharding)

    layers = []
    for layer, (k_scale, v_scale) in zip(cache, scales, strict=True):
        assert isinstance(layer, ScaledCache), type(layer)
        layers.append(
            dataclasses.replace(
                layer, k_scale=put(k_scale, layer.k_scale), v_scale=put(v_scale, layer.v_scale)
            )
        )
    return tuple(layers)


def measured_peaks(model: AbstractModel, params: tuple[jax.Array, ...]) -> np.ndarray:
    """Returns each channel's largest key and value over random tokens.

    The shape is [layers, 2, kv_heads, head_dim], f32.
    """
    config = model.config
    count = min(_NUM_TOKENS, config.max_positions)
    layout = layout_for(
        "reference",
        page_size=count,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=jnp.dtype(jnp.float32),
    )
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=count, dtype=np.int32)

    sharding: Any = model.shapes[0].sharding

    # Every process gets the whole answer, as each computes the scales.
    @functools.partial(jax.jit, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    def measure(params: tuple[jax.Array, ...], tokens: jax.Array) -> jax.Array:
        module = nnx.merge(model.graph, jax.tree.unflatten(model.tree, params))
        cache: Cache = tuple(
            tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in layout.shapes(1))
            for _ in range(config.num_layers)
        )
        batch = Batch(
            tokens=tokens,
            positions=jnp.arange(count, dtype=jnp.int32),
            kv_lens=jnp.array([count], jnp.int32),
            page_table=jnp.zeros((1, 1), jnp.int32),
            cu_q_lens=jnp.array([0, count], jnp.int32),
            counts=jnp.array([0, 1], jnp.int32),
            attention="reference",
            experts="reference",
        )
        _, cache = module(batch, cache)
        layers = [layer for layer in cache if not isinstance(layer, ScaledCache)]
        pages = jnp.stack([jnp.stack(layer) for layer in layers])  # the reference's: row by row
        return jnp.abs(pages).max((2, 3))

    return np.asarray(measure(params, tokens)).reshape(
        config.num_layers, 2, config.num_kv_heads, config.head_dim
    )
