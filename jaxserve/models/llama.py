"""Llama 2 and 3, Mistral, SmolLM2, TinyLlama: the family that most checkpoints follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.batch import Batch, Cache
from jaxserve.models.hf_config import refuse_unless
from jaxserve.models.layers import Attention, Decoder, Layer, Norm, forward, head_logits, head_of
from jaxserve.ops.rope import Rope, rope_from_hf


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
    rope: Rope
    windows: tuple[int | None, ...]  # keys each layer sees; None: all
    is_tied: bool  # the head is the embedding
    max_positions: int
    num_experts: int = 0
    expert_ffw_size: int = 0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """Returns the config of a Hugging Face config.json; WeightError for what is not handled."""
        refuse_unless(config, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
        num_heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffw_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=rope_from_hf(config, 10000.0),
            windows=(config.get("sliding_window"),) * config["num_hidden_layers"],
            is_tied=config.get("tie_word_embeddings", False),
            max_positions=config.get("max_position_embeddings", 2048),
        )


class Llama(nnx.Module):
    """The model; attribute paths are the checkpoint's parameter names."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: jnp.dtype,  # of weights
        activation_dtype: jnp.dtype,  # of what flows between layers
    ) -> None:
        def layer(window: int | None) -> Layer:
            return Layer(config, Attention(config, dtype, sliding_window=window), dtype)

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
