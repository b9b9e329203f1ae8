"""Llama 2 and 3, Mistral, SmolLM2, TinyLlama: the family that most checkpoints follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.batch import Batch, Cache, LayerState
from jaxserve.errors import WeightError
from jaxserve.ops.attention import attend
from jaxserve.ops.linear import linear, matmul_f32
from jaxserve.ops.norm import rms_norm
from jaxserve.ops.rope import (
    RopeScaling,
    apply_rope,
    inverse_frequencies,
    rope_angles,
    rope_scaling_from_hf,
)

Angles = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The numbers that shape the model."""

    vocab_size: int
    hidden_size: int
    ffw_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    sliding_window: int | None
    is_tied: bool  # the head is the embedding
    max_positions: int

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """Returns the config of a Hugging Face config.json; WeightError for what is not handled."""
        for key, handled in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
        ):
            if config.get(key, handled) != handled:
                raise WeightError(f"config.json: {key} = {config[key]!r} is not supported")
        num_heads = config["num_attention_heads"]
        parameters = config.get("rope_parameters") or {}
        theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffw_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=rope_scaling_from_hf(config),
            sliding_window=config.get("sliding_window"),
            is_tied=config.get("tie_word_embeddings", False),
            max_positions=config.get("max_position_embeddings", 2048),
        )


class Widths(Protocol):
    """What the modules that families share read of a config."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def ffw_size(self) -> int: ...

    @property
    def norm_eps(self) -> float: ...


class Linear(nnx.Module):
    """A matrix, and a bias where the family has one."""

    def __init__(
        self,
        out: tuple[str, int],
        in_: tuple[str, int],
        dtype: jnp.dtype,
        *,
        has_bias: bool = False,
    ) -> None:
        axes, shape = zip(out, in_, strict=True)
        self.weight = nnx.Param(jnp.zeros(shape, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[:1], dtype), axes=axes[:1]) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:  # [rows, in] -> [rows, out]
        if self.bias is None:
            return linear(x, self.weight[...])
        # Added before the sum is rounded: Qwen2's biases are hundreds of times its products.
        bias = self.bias[...].astype(jnp.float32)[None, :]
        return (matmul_f32(x, self.weight[...]) + bias).astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm's weight."""

    def __init__(self, config: Widths, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((config.hidden_size,), dtype), axes=("hidden",))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:  # [rows, hidden]
        return rms_norm(x, self.weight[...], self.eps)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype) -> None:
        hidden = ("hidden", config.hidden_size)
        heads = ("heads", config.num_heads * config.head_dim)
        kv_heads = ("kv_heads", config.num_kv_heads * config.head_dim)
        self.q_proj = Linear(heads, hidden, dtype)
        self.k_proj = Linear(kv_heads, hidden, dtype)
        self.v_proj = Linear(kv_heads, hidden, dtype)
        self.o_proj = Linear(hidden, heads, dtype)
        self.head_dim = config.head_dim
        self.sliding_window = config.sliding_window

    def __call__(
        self,
        x: jax.Array,  # [tokens, hidden]
        angles: Angles,
        batch: Batch,
        cache: LayerState,
    ) -> tuple[jax.Array, LayerState]:  # [tokens, hidden]
        tokens = x.shape[0]
        q = self.q_proj(x).reshape(tokens, -1, self.head_dim)
        k = self.k_proj(x).reshape(tokens, -1, self.head_dim)
        v = self.v_proj(x).reshape(tokens, -1, self.head_dim)
        out, cache = attend(
            apply_rope(q, angles),
            apply_rope(k, angles),
            v,
            cache,
            batch,
            scale=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
        )
        return self.o_proj(out.reshape(tokens, -1)), cache


class Mlp(nnx.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: Widths, dtype: jnp.dtype) -> None:
        hidden, ffw = ("hidden", config.hidden_size), ("ffw", config.ffw_size)
        self.gate_proj = Linear(ffw, hidden, dtype)
        self.up_proj = Linear(ffw, hidden, dtype)
        self.down_proj = Linear(hidden, ffw, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:  # [tokens, hidden]
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each on a normalised residual."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype) -> None:
        self.input_layernorm = Norm(config, dtype)
        self.self_attn = Attention(config, dtype)
        self.post_attention_layernorm = Norm(config, dtype)
        self.mlp = Mlp(config, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, batch: Batch, cache: LayerState
    ) -> tuple[jax.Array, LayerState]:  # [tokens, hidden]
        out, cache = self.self_attn(self.input_layernorm(x), angles, batch, cache)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Embedding(nnx.Module):
    """One row for each token."""

    def __init__(self, config: Widths, dtype: jnp.dtype) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(jnp.zeros(shape, dtype), axes=("vocab", "hidden"))


class Decoder(nnx.Module):
    """Embedding, layers and final norm; the head belongs to `Llama`."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype) -> None:
        self.embed_tokens = Embedding(config, dtype)
        self.layers = nnx.List([Layer(config, dtype) for _ in range(config.num_layers)])
        self.norm = Norm(config, dtype)


class Llama(nnx.Module):
    """The model; attribute paths are the checkpoint's parameter names."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: jnp.dtype,  # of weights
        activation_dtype: jnp.dtype,  # of what flows between layers
    ) -> None:
        self.model = Decoder(config, dtype)
        if not config.is_tied:
            vocab, hidden = ("vocab", config.vocab_size), ("hidden", config.hidden_size)
            self.lm_head = Linear(vocab, hidden, dtype)
        self.config = config
        self.activation_dtype = activation_dtype

    def __call__(self, batch: Batch, cache: Cache) -> tuple[jax.Array, Cache]:
        """Computes the step's tokens. Returns `[tokens, hidden]`, before the final norm."""
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angles = rope_angles(batch.positions, frequencies)
        x = self.model.embed_tokens.weight[...][batch.tokens].astype(self.activation_dtype)
        layers = []
        for layer, layer_cache in zip(self.model.layers, cache, strict=True):
            with jax.named_scope("layer"):
                x, layer_cache = layer(x, angles, batch, layer_cache)
            layers.append(layer_cache)
        return x, tuple(layers)

    def logits(self, hidden: jax.Array) -> jax.Array:  # [rows, hidden] -> [rows, vocab] f32
        """Returns the logits of the tokens that follow the given rows."""
        head = self.model.embed_tokens if self.config.is_tied else self.lm_head
        with jax.named_scope("lm_head"):
            return matmul_f32(self.model.norm(hidden), head.weight[...])
