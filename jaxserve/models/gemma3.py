"""Gemma 3, text only: windows that slide in most layers, and a norm on each side of everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.batch import Batch, Cache, LayerState
from jaxserve.errors import WeightError
from jaxserve.models.hf_config import layer_windows, refuse_unless
from jaxserve.models.llama import Angles, Embedding, Linear
from jaxserve.ops.attention import attend
from jaxserve.ops.linear import matmul_f32
from jaxserve.ops.norm import rms_norm
from jaxserve.ops.rope import Rope, apply_rope, inverse_frequencies, rope_angles, rope_from_hf


@dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """The numbers that shape the model."""

    vocab_size: int
    hidden_size: int
    ffw_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    attention_scale: float
    attention_soft_cap: float | None
    logit_soft_cap: float | None
    windows: tuple[int | None, ...]  # keys each layer sees; None: all
    local_rope: Rope  # of layers with a window
    global_rope: Rope
    has_attention_bias: bool
    is_tied: bool  # the head is the embedding
    max_positions: int

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Gemma3Config:
        """Returns the config of a Hugging Face config.json; WeightError for what is not handled."""
        refuse_unless(
            config,
            {
                "hidden_activation": "gelu_pytorch_tanh",
                "use_bidirectional_attention": False,
                "mlp_bias": False,
                "rope_frequency_factors": None,
            },
        )
        pattern = config.get("sliding_window_pattern") or 6
        local_rope, global_rope = _ropes(config)
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffw_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or 256,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
            attention_soft_cap=config.get("attn_logit_softcapping"),
            logit_soft_cap=config.get("final_logit_softcapping"),
            windows=layer_windows(
                config, config.get("sliding_window", 4096), lambda layer: (layer + 1) % pattern != 0
            ),
            local_rope=local_rope,
            global_rope=global_rope,
            has_attention_bias=bool(config.get("attention_bias")),
            is_tied=config.get("tie_word_embeddings", True),
            max_positions=config.get("max_position_embeddings", 131072),
        )


def _ropes(config: dict[str, Any]) -> tuple[Rope, Rope]:
    """Returns the rotation of layers with a window and that of the others.

    transformers 5 nests them by kind of layer. Before, each had a theta, and a scaling was meant
    for the others alone.
    """
    nested = config.get("rope_parameters") or {}
    if unknown := set(nested) - {"sliding_attention", "full_attention"}:
        raise WeightError(f"config.json: rope_parameters holds {sorted(unknown)} of no layer")
    local_theta, theta = config.get("rope_local_base_freq", 1e4), config.get("rope_theta", 1e6)
    local = nested.get("sliding_attention") or {}
    others = (nested.get("full_attention") or {}) | (config.get("rope_scaling") or {})
    return (
        rope_from_hf({"rope_parameters": local}, local_theta),
        rope_from_hf({"rope_parameters": others}, theta),
    )


class Norm(nnx.Module):
    """RMSNorm whose weight is stored as its distance from 1."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((size,), dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., size]
        return rms_norm(x, self.weight[...], self.eps, offset=1.0)


class Attention(nnx.Module):
    """Grouped-query attention on normalised heads with rotary positions."""

    def __init__(self, config: Gemma3Config, layer: int, dtype: jnp.dtype) -> None:
        hidden = ("hidden", config.hidden_size)
        heads = ("heads", config.num_heads * config.head_dim)
        kv_heads = ("kv_heads", config.num_kv_heads * config.head_dim)
        has_bias = config.has_attention_bias
        self.q_proj = Linear(heads, hidden, dtype, has_bias=has_bias)
        self.k_proj = Linear(kv_heads, hidden, dtype, has_bias=has_bias)
        self.v_proj = Linear(kv_heads, hidden, dtype, has_bias=has_bias)
        self.o_proj = Linear(hidden, heads, dtype, has_bias=has_bias)
        self.q_norm = Norm(config.head_dim, config.norm_eps, dtype)
        self.k_norm = Norm(config.head_dim, config.norm_eps, dtype)
        self.head_dim = config.head_dim
        self.scale = config.attention_scale
        self.soft_cap = config.attention_soft_cap
        self.window = config.windows[layer]

    def __call__(
        self,
        x: jax.Array,  # [tokens, hidden]
        angles: Angles,
        batch: Batch,
        cache: LayerState,
    ) -> tuple[jax.Array, LayerState]:  # [tokens, hidden]
        tokens = x.shape[0]
        q = self.q_norm(self.q_proj(x).reshape(tokens, -1, self.head_dim))
        k = self.k_norm(self.k_proj(x).reshape(tokens, -1, self.head_dim))
        v = self.v_proj(x).reshape(tokens, -1, self.head_dim)
        out, cache = attend(
            apply_rope(q, angles),
            apply_rope(k, angles),
            v,
            cache,
            batch,
            scale=self.scale,
            sliding_window=self.window,
            soft_cap=self.soft_cap,
        )
        return self.o_proj(out.reshape(tokens, -1)), cache


class Mlp(nnx.Module):
    """GeGLU (https://arxiv.org/abs/2002.05202), with the tanh form of GELU."""

    def __init__(self, config: Gemma3Config, dtype: jnp.dtype) -> None:
        hidden, ffw = ("hidden", config.hidden_size), ("ffw", config.ffw_size)
        self.gate_proj = Linear(ffw, hidden, dtype)
        self.up_proj = Linear(ffw, hidden, dtype)
        self.down_proj = Linear(hidden, ffw, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:  # [tokens, hidden]
        gate = jax.nn.gelu(self.gate_proj(x), approximate=True)
        return self.down_proj(gate * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each normalised before it and before it is added."""

    def __init__(self, config: Gemma3Config, layer: int, dtype: jnp.dtype) -> None:
        size, eps = config.hidden_size, config.norm_eps
        self.input_layernorm = Norm(size, eps, dtype)
        self.self_attn = Attention(config, layer, dtype)
        self.post_attention_layernorm = Norm(size, eps, dtype)
        self.pre_feedforward_layernorm = Norm(size, eps, dtype)
        self.mlp = Mlp(config, dtype)
        self.post_feedforward_layernorm = Norm(size, eps, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, batch: Batch, cache: LayerState
    ) -> tuple[jax.Array, LayerState]:  # [tokens, hidden]
        out, cache = self.self_attn(self.input_layernorm(x), angles, batch, cache)
        x = x + self.post_attention_layernorm(out)
        out = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(out), cache


class Decoder(nnx.Module):
    """Embedding, layers and final norm; the head belongs to `Gemma3`."""

    def __init__(self, config: Gemma3Config, dtype: jnp.dtype) -> None:
        self.embed_tokens = Embedding(config, dtype)
        self.layers = nnx.List([Layer(config, layer, dtype) for layer in range(config.num_layers)])
        self.norm = Norm(config.hidden_size, config.norm_eps, dtype)


class Gemma3(nnx.Module):
    """The model; attribute paths are the checkpoint's parameter names."""

    def __init__(
        self,
        config: Gemma3Config,
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
        local_angles, global_angles = (
            rope_angles(
                batch.positions, inverse_frequencies(config.head_dim, rope.theta, rope.scaling)
            )
            for rope in (config.local_rope, config.global_rope)
        )
        x = self.model.embed_tokens.weight[...][batch.tokens].astype(self.activation_dtype)
        # Rounded first, as in training: in bfloat16, the root of 3072 is 55.5.
        x = x * jnp.asarray(config.hidden_size**0.5, self.activation_dtype)
        layers = []
        for layer, window, layer_cache in zip(
            self.model.layers, config.windows, cache, strict=True
        ):
            angles = global_angles if window is None else local_angles
            with jax.named_scope("layer"):
                x, layer_cache = layer(x, angles, batch, layer_cache)
            layers.append(layer_cache)
        return x, tuple(layers)

    def logits(self, hidden: jax.Array) -> jax.Array:  # [rows, hidden] -> [rows, vocab] f32
        """Returns the logits of the tokens that follow the given rows."""
        head = self.model.embed_tokens if self.config.is_tied else self.lm_head
        cap = self.config.logit_soft_cap
        with jax.named_scope("lm_head"):
            logits = matmul_f32(self.model.norm(hidden), head.weight[...])
            return logits if cap is None else cap * jnp.tanh(logits / cap)
