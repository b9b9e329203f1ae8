"""Qwen2, Qwen2.5 and Qwen3 (dense): Llama with biased projections, or with normalised heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.batch import Batch, Cache, LayerState
from jaxserve.errors import WeightError
from jaxserve.models.hf_config import layer_windows, refuse_unless
from jaxserve.models.llama import Angles, Embedding, Linear, Mlp, Norm
from jaxserve.ops.attention import attend
from jaxserve.ops.linear import matmul_f32
from jaxserve.ops.norm import rms_norm
from jaxserve.ops.rope import Rope, apply_rope, inverse_frequencies, rope_angles, rope_from_hf


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    """The numbers that shape the model."""

    vocab_size: int
    hidden_size: int
    ffw_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]  # keys each layer sees; None: all
    has_qkv_bias: bool
    has_output_bias: bool
    has_head_norms: bool  # of queries and keys
    is_tied: bool  # the head is the embedding
    max_positions: int

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> QwenConfig:
        """Returns the config of a Hugging Face config.json; WeightError for what is not handled."""
        kind = config["model_type"]
        if kind not in ("qwen2", "qwen3"):
            raise WeightError(f"config.json: model_type {kind!r} is not qwen2 or qwen3")
        is_qwen2 = kind == "qwen2"
        refuse_unless(
            config, {"hidden_act": "silu", "mlp_bias": False, "is_causal": True, "use_mrope": False}
        )
        if is_qwen2:  # its layers have the bias whatever the config says
            refuse_unless(config, {"attention_bias": True})
        has_bias = is_qwen2 or bool(config.get("attention_bias"))
        heads = config["num_attention_heads"]
        head_dim = config["hidden_size"] // heads if is_qwen2 else 128
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        first_window = config.get("max_window_layers", 28)
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffw_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or head_dim,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=rope_from_hf(config, 10000.0),
            windows=layer_windows(
                config, window, lambda layer: window is not None and layer >= first_window
            ),
            has_qkv_bias=has_bias,
            has_output_bias=has_bias and not is_qwen2,
            has_head_norms=not is_qwen2,
            is_tied=config.get("tie_word_embeddings", False),
            max_positions=config.get("max_position_embeddings", 32768),
        )


class HeadNorm(nnx.Module):
    """RMSNorm over each head."""

    def __init__(self, config: QwenConfig, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((config.head_dim,), dtype), axes=(None,))
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:  # [tokens, heads, head_dim]
        return rms_norm(x, self.weight[...], self.eps)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: QwenConfig, layer: int, dtype: jnp.dtype) -> None:
        hidden = ("hidden", config.hidden_size)
        heads = ("heads", config.num_heads * config.head_dim)
        kv_heads = ("kv_heads", config.num_kv_heads * config.head_dim)
        self.q_proj = Linear(heads, hidden, dtype, has_bias=config.has_qkv_bias)
        self.k_proj = Linear(kv_heads, hidden, dtype, has_bias=config.has_qkv_bias)
        self.v_proj = Linear(kv_heads, hidden, dtype, has_bias=config.has_qkv_bias)
        self.o_proj = Linear(hidden, heads, dtype, has_bias=config.has_output_bias)
        self.q_norm = HeadNorm(config, dtype) if config.has_head_norms else None
        self.k_norm = HeadNorm(config, dtype) if config.has_head_norms else None
        self.head_dim = config.head_dim
        self.window = config.windows[layer]

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
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, cache = attend(
            apply_rope(q, angles),
            apply_rope(k, angles),
            v,
            cache,
            batch,
            scale=self.head_dim**-0.5,
            sliding_window=self.window,
        )
        return self.o_proj(out.reshape(tokens, -1)), cache


class Layer(nnx.Module):
    """Attention and feed-forward, each on a normalised residual."""

    def __init__(self, config: QwenConfig, layer: int, dtype: jnp.dtype) -> None:
        self.input_layernorm = Norm(config, dtype)
        self.self_attn = Attention(config, layer, dtype)
        self.post_attention_layernorm = Norm(config, dtype)
        self.mlp = Mlp(config, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, batch: Batch, cache: LayerState
    ) -> tuple[jax.Array, LayerState]:  # [tokens, hidden]
        out, cache = self.self_attn(self.input_layernorm(x), angles, batch, cache)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """Embedding, layers and final norm; the head belongs to `Qwen`."""

    def __init__(self, config: QwenConfig, dtype: jnp.dtype) -> None:
        self.embed_tokens = Embedding(config, dtype)
        self.layers = nnx.List([Layer(config, layer, dtype) for layer in range(config.num_layers)])
        self.norm = Norm(config, dtype)


class Qwen(nnx.Module):
    """The model; attribute paths are the checkpoint's parameter names."""

    def __init__(
        self,
        config: QwenConfig,
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
        rope = self.config.rope
        frequencies = inverse_frequencies(self.config.head_dim, rope.theta, rope.scaling)
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
