"""Qwen2, Qwen2.5 and Qwen3 (dense): Llama with biased projections, or with normalised heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.batch import Batch, Cache
from jaxserve.errors import WeightError
from jaxserve.models.hf_config import layer_windows, refuse_unless
from jaxserve.models.layers import Attention, Decoder, Layer, Norm, forward, head_logits, head_of
from jaxserve.ops.rope import Rope, rope_from_hf


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
    num_experts: int = 0
    expert_ffw_size: int = 0

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


class Qwen(nnx.Module):
    """The model; attribute paths are the checkpoint's parameter names."""

    def __init__(
        self,
        config: QwenConfig,
        *,
        dtype: jnp.dtype,  # of weights
        activation_dtype: jnp.dtype,  # of what flows between layers
    ) -> None:
        def head_norm() -> Norm:
            return Norm(config.head_dim, config.norm_eps, dtype)

        def layer(window: int | None) -> Layer:
            attention = Attention(
                config,
                dtype,
                sliding_window=window,
                has_qkv_bias=config.has_qkv_bias,
                has_output_bias=config.has_output_bias,
                head_norm=head_norm if config.has_head_norms else None,
            )
            return Layer(config, attention, dtype)

        norm = Norm(config.hidden_size, config.norm_eps, dtype)
        self.model = Decoder(config, [layer(window) for window in config.windows], norm, dtype)
        self.lm_head = None if config.is_tied else head_of(config, dtype)
        self.config = config
        self.activation_dtype = activation_dtype

    def __call__(self, batch: Batch, cache: Cache) -> tuple[jax.Array, Cache]:
        """Computes the step's tokens. Returns `[tokens, hidden]`, before the final norm."""
        return forward(self.config, self.model, batch, cache, dtype=self.activation_dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:  # [rows, hidden] -> [rows, vocab] f32
        """Returns the logits of the tokens that follow the given rows."""
        return head_logits(self.config, self.model, self.lm_head, hidden)
