"""Layers with a mixture of experts in place of their feed-forward.

Attribute names are those of Hugging Face checkpoints, but for the experts' matrices: each is one
parameter, a stack of what checkpoints store one by one (`checkpoint.experts`).
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.batch import Batch, LayerState
from jaxserve.models.layers import Angles, Attention, Norm, Widths
from jaxserve.ops.moe import mix_experts, route, router_logits
from jaxserve.ops.parallel import index_along, sum_over
from jaxserve.ops.quantization import QuantizedWeight


class ExpertWidths(Widths, Protocol):
    """What these modules read of a family's config."""

    @property
    def expert_ffw_size(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def experts_per_token(self) -> int: ...

    @property
    def is_renormalized(self) -> bool: ...


class Router(nnx.Module):
    """A row for each expert: whole on every device, and never quantised."""

    def __init__(self, config: ExpertWidths, dtype: jnp.dtype) -> None:
        shape = (config.num_experts, config.hidden_size)
        self.weight = nnx.Param(jnp.zeros(shape, dtype), axes=("router", "hidden"))


class ExpertMatrices(nnx.Module):
    """One matrix of every expert."""

    def __init__(
        self, num_experts: int, out: tuple[str, int], in_: tuple[str, int], dtype: jnp.dtype
    ) -> None:
        axes, shape = zip(("experts", num_experts), out, in_, strict=True)
        self.weight = nnx.Param(jnp.zeros(shape, dtype), axes=axes)


class Experts(nnx.Module):
    """The gated feed-forwards that tokens are routed to."""

    def __init__(self, config: ExpertWidths, dtype: jnp.dtype) -> None:
        count = config.num_experts
        hidden, ffw = ("hidden", config.hidden_size), ("expert_ffw", config.expert_ffw_size)
        self.gate_proj = ExpertMatrices(count, ffw, hidden, dtype)
        self.up_proj = ExpertMatrices(count, ffw, hidden, dtype)
        self.down_proj = ExpertMatrices(count, hidden, ffw, dtype)


class Mixture(nnx.Module):
    """A router and its experts."""

    def __init__(self, config: ExpertWidths, dtype: jnp.dtype) -> None:
        self.gate = Router(config, dtype)
        self.experts = Experts(config, dtype)
        self.top_k = config.experts_per_token
        self.is_renormalized = config.is_renormalized

    def __call__(
        self,
        x: jax.Array,  # [tokens, hidden]
        batch: Batch,
    ) -> jax.Array:  # [tokens, hidden]
        logits = router_logits(x, self.gate.weight[...])
        routing = route(logits, self.top_k, is_renormalized=self.is_renormalized)
        gate = self.experts.gate_proj.weight[...]
        # In a mesh a device has some of the experts, or columns of them.
        num_experts = (gate.data if isinstance(gate, QuantizedWeight) else gate).shape[0]
        out = mix_experts(
            x,
            routing,
            gate,
            self.experts.up_proj.weight[...],
            self.experts.down_proj.weight[...],
            first_expert=index_along("experts") * num_experts,
            num_tokens=batch.cu_q_lens[batch.counts[1]],
            activation=jax.nn.silu,
            backend=batch.experts,
        )
        return sum_over(out.astype(x.dtype), "experts", "expert_ffw")


class ExpertLayer(nnx.Module):
    """Attention and a mixture of experts, each on a normalised residual."""

    def __init__(self, config: ExpertWidths, attention: Attention, dtype: jnp.dtype) -> None:
        self.input_layernorm = Norm(config.hidden_size, config.norm_eps, dtype)
        self.self_attn = attention
        self.post_attention_layernorm = Norm(config.hidden_size, config.norm_eps, dtype)
        self.mlp = Mixture(config, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, batch: Batch, cache: LayerState
    ) -> tuple[jax.Array, LayerState]:  # [tokens, hidden]
        out, cache = self.self_attn(self.input_layernorm(x), angles, batch, cache)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x), batch), cache
