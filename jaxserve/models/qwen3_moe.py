"""Qwen3 with experts: Qwen3, of which some layers or all have a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.batch import Batch, Cache
from jaxserve.errors import WeightError
from jaxserve.models.experts import ExpertLayer
from jaxserve.models.hf_config import check_experts, refuse_unless
from jaxserve.models.layers import (
    Attention,
    Decoder,
    DecoderLayer,
    Layer,
    Norm,
    forward,
    head_logits,
    head_of,
)
from jaxserve.ops.rope import Rope, rope_from_hf


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig:
    """The numbers that shape the model."""

    vocab_size: int
    hidden_size: int
    ffw_size: int  # of layers without experts
    expert_ffw_size: int
    num_experts: int
    experts_per_token: int
    is_renormalized: bool  # a token's weights sum to 1
    has_experts: tuple[bool, ...]  # of each layer
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]  # keys each layer sees; None: all
    has_bias: bool  # of attention's four matrices
    is_tied: bool  # the head is the embedding
    max_positions: int

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen3MoeConfig:
        """Returns the config of a Hugging Face config.json; WeightError for what is not handled."""
        if config["model_type"] != "qwen3_moe":
            raise WeightError(f"config.json: model_type {config['model_type']!r} is not qwen3_moe")
        refuse_unless(config, {"hidden_act": "silu", "mlp_bias": False, "use_mrope": False})
        for key in ("shared_expert_intermediate_size", "n_shared_experts", "layer_types"):
            if config.get(key):
                raise WeightError(f"config.json: {key} = {config[key]!r} is not supported")
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        # transformers 5 has a second name for it, as has GGUF.
        num_experts = config[
            "num_local_experts" if "num_local_experts" in config else "num_experts"
        ]
        check_experts(num_experts, config["num_experts_per_tok"])
        window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            ffw_size=config["intermediate_size"],
            expert_ffw_size=config["moe_intermediate_size"],
            num_experts=num_experts,
            experts_per_token=config["num_experts_per_tok"],
            is_renormalized=config.get("norm_topk_prob", False),
            has_experts=_layers_with_experts(config, layers),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=rope_from_hf(config, 10000.0),
            windows=(window,) * layers,
            has_bias=bool(config.get("attention_bias")),
            is_tied=config.get("tie_word_embeddings", False),
            max_positions=config.get("max_position_embeddings", 32768),
        )


def _layers_with_experts(config: dict[str, Any], num_layers: int) -> tuple[bool, ...]:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise WeightError(f"config.json: decoder_sparse_step = {step!r}; it must be at least 1")
    if any(type(layer) is not int or not 0 <= layer < num_layers for layer in dense):
        raise WeightError(
            f"config.json: mlp_only_layers = {dense!r}, but layers are 0 to {num_layers - 1}"
        )
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


class Qwen3Moe(nnx.Module):
    """The model; attribute paths are the checkpoint's parameter names."""

    def __init__(
        self,
        config: Qwen3MoeConfig,
        *,
        dtype: jnp.dtype,  # of weights
        activation_dtype: jnp.dtype,  # of what flows between layers
    ) -> None:
        def head_norm() -> Norm:
            return Norm(config.head_dim, config.norm_eps, dtype)

        def layer(window: int | None, has_experts: bool) -> DecoderLayer:
            attention = Attention(
                config,
                dtype,
                sliding_window=window,
                has_qkv_bias=config.has_bias,
                has_output_bias=config.has_bias,
                head_norm=head_norm,
            )
            return (ExpertLayer if has_experts else Layer)(config, attention, dtype)

        norm = Norm(config.hidden_size, config.norm_eps, dtype)
        layers = map(layer, config.windows, config.has_experts)
        self.model = Decoder(config, list(layers), norm, dtype)
        self.lm_head = None if config.is_tied else head_of(config, dtype)
        self.config = config
        self.activation_dtype = activation_dtype

    def __call__(self, batch: Batch, cache: Cache) -> tuple[jax.Array, Cache]:
        """Computes the step's tokens. Returns `[tokens, hidden]`, before the final norm."""
        return forward(self.config, self.model, batch, cache, dtype=self.activation_dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:  # [rows, hidden] -> [rows, vocab] f32
        """Returns the logits of the tokens that follow the given rows."""
        return head_logits(self.config, self.model, self.lm_head, hidden)
