"""Gemma 3, text only: windows that slide in most layers, and a norm on each side of everything."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.batch import Batch, Cache, LayerState
from jaxserve.errors import WeightError
from jaxserve.models.hf_config import layer_windows, refuse_unless
from jaxserve.models.layers import Angles, Attention, Decoder, Mlp, Norm, head_logits, head_of
from jaxserve.ops.rope import Rope, inverse_frequencies, rope_angles, rope_from_hf


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
    num_experts: int = 0
    expert_ffw_size: int = 0

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


def _norm(config: Gemma3Config, size: int, dtype: jnp.dtype) -> Norm:
    """Returns a norm whose weight is stored as its distance from 1."""
    return Norm(size, config.norm_eps, dtype, offset=1.0)


class Gemma3Layer(nnx.Module):
    """Attention and feed-forward, each normalised before it and before it is added."""

    def __init__(self, config: Gemma3Config, window: int | None, dtype: jnp.dtype) -> None:
        self.input_layernorm = _norm(config, config.hidden_size, dtype)
        self.self_attn = Attention(
            config,
            dtype,
            sliding_window=window,
            scale=config.attention_scale,
            soft_cap=config.attention_soft_cap,
            has_qkv_bias=config.has_attention_bias,
            has_output_bias=config.has_attention_bias,
            head_norm=functools.partial(_norm, config, config.head_dim, dtype),
        )
        self.post_attention_layernorm = _norm(config, config.hidden_size, dtype)
        self.pre_feedforward_layernorm = _norm(config, config.hidden_size, dtype)
        self.mlp = Mlp(config, dtype, activation=functools.partial(jax.nn.gelu, approximate=True))
        self.post_feedforward_layernorm = _norm(config, config.hidden_size, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, batch: Batch, cache: LayerState
    ) -> tuple[jax.Array, LayerState]:  # [tokens, hidden]
        out, cache = self.self_attn(self.input_layernorm(x), angles, batch, cache)
        x = x + self.post_attention_layernorm(out)
        out = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(out), cache


class Gemma3(nnx.Module):
    """The model; attribute paths are the checkpoint's parameter names."""

    def __init__(
        self,
        config: Gemma3Config,
        *,
        dtype: jnp.dtype,  # of weights
        activation_dtype: jnp.dtype,  # of what flows between layers
    ) -> None:
        layers = [Gemma3Layer(config, window, dtype) for window in config.windows]
        norm = _norm(config, config.hidden_size, dtype)
        self.model = Decoder(config, layers, norm, dtype)
        self.lm_head = None if config.is_tied else head_of(config, dtype)
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
        angles = [global_angles if window is None else local_angles for window in config.windows]
        # Rounded first, as in training: in bfloat16, the root of 3072 is 55.5.
        factor = jnp.asarray(config.hidden_size**0.5, self.activation_dtype)
        x = self.model.embed(batch, self.activation_dtype) * factor
        return self.model.visit(x, angles, batch, cache)

    def logits(self, hidden: jax.Array) -> jax.Array:  # [rows, hidden] -> [rows, vocab] f32
        """Returns the logits of the tokens that follow the given rows."""
        logits = head_logits(self.config, self.model, self.lm_head, hidden)
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
