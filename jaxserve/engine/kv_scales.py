"""Finds the scales of an 8-bit KV cache: the checkpoint's, or by running the model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.batch import Batch, Cache, ScaledCache
from jaxserve.models.checkpoint import Checkpoint
from jaxserve.models.checkpoint.kv_scales import read_kv_peaks
from jaxserve.models.loading import AbstractModel
from pallas_kernels.ragged_paged_attention import layout_for

_NUM_TOKENS = 256
_MARGIN = 1.25  # over the largest key or value of random tokens; what is larger saturates
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 448.0}


def kv_scales_for(
    model: AbstractModel,
    params: tuple[jax.Array, ...],
    checkpoint: Checkpoint,
    dtype: jnp.dtype,  # of the KV cache
) -> np.ndarray | None:  # [layers, 2] f32, of keys and values
    """Returns each layer's scales; None for a cache that has none.

    float8 reaches far enough to store keys and values as they are: without the checkpoint's word
    its scales are 1. int8 has 127 steps, so that its scales must fit each layer.
    """
    if dtype.itemsize > 1:
        return None
    num_layers = model.config.num_layers
    peaks = read_kv_peaks(checkpoint, num_layers)
    if peaks is None:
        if dtype != jnp.int8:
            return np.ones((num_layers, 2), np.float32)
        peaks = measured_peaks(model, params) * np.float32(_MARGIN)
    return np.maximum(peaks / np.float32(_LARGEST[dtype.name]), np.float32(1e-6))


def with_scales(
    cache: Cache,
    scales: np.ndarray,  # [layers, 2] f32, of keys and values
) -> Cache:
    """Returns a cache of 8-bit numbers with these scales, on the devices of those it had."""
    layers = []
    for layer, (k_scale, v_scale) in zip(cache, scales, strict=True):
        assert isinstance(layer, ScaledCache), type(layer)
        layers.append(
            dataclasses.replace(
                layer,
                k_scale=jax.device_put(k_scale, layer.k_scale.sharding),
                v_scale=jax.device_put(v_scale, layer.v_scale.sharding),
            )
        )
    return tuple(layers)


def measured_peaks(model: AbstractModel, params: tuple[jax.Array, ...]) -> np.ndarray:
    """Returns the largest key and value of each layer over random tokens: [layers, 2] f32."""
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

    @jax.jit
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
        )
        _, cache = module(batch, cache)
        return jnp.stack([jnp.stack([jnp.abs(side).max() for side in layer]) for layer in cache])

    return np.asarray(measure(params, tokens))
