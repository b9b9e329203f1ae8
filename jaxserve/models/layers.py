"""Modules that decoders are built from; a family's own file says which, and adds what is its own.

Attribute names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.batch import Batch, Cache, LayerState
from jaxserve.ops.attention import attend
from jaxserve.ops.linear import linear, matmul_f32
from jaxserve.ops.norm import rms_norm
from jaxserve.ops.parallel import parts_along, sum_over
from jaxserve.ops.rope import Rope, apply_rope, inverse_frequencies, rope_angles
from jaxserve.ops.vocab import first_token, local_tokens

Angles: TypeAlias = tuple[jax.Array, jax.Array]  # of `rope_angles`


class Widths(Protocol):
    """What these modules read of a family's config."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def ffw_size(self) -> int: ...

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def norm_eps(self) -> float: ...


class RotaryWidths(Widths, Protocol):
    """What `forward` reads of one as well."""

    @property
    def num_layers(self) -> int: ...

    @property
    def rope(self) -> Rope: ...


class DecoderLayer(Protocol):
    """One layer of a family."""

    def __call__(
        self, x: jax.Array, angles: Angles, batch: Batch, cache: LayerState
    ) -> tuple[jax.Array, LayerState]:
        """Returns `[tokens, hidden]` and the layer's cache."""


class Linear(nnx.Module):
    """A matrix, and a bias where the family has one.

    In a mesh it holds the device's rows; or its columns, when all devices' products are summed.
    """

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
        self.in_axis = in_[0]

    def __call__(self, x: jax.Array) -> jax.Array:  # [rows, in] -> [rows, out]
        if self.bias is None:
            return sum_over(linear(x, self.weight[...]), self.in_axis)
        # Added before the sum is rounded: Qwen2's biases are hundreds of times its products.
        out = sum_over(matmul_f32(x, self.weight[...]), self.in_axis)
        return (out + self.bias[...].astype(jnp.float32)[None, :]).astype(x.dtype)


class Embedding(nnx.Module):
    """One row for each token."""

    def __init__(self, config: Widths, dtype: jnp.dtype) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nnx.Param(jnp.zeros(shape, dtype), axes=("vocab", "hidden"))


class Norm(nnx.Module):
    """RMSNorm over the last axis; the weight may be stored as its distance from `offset`."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, *, offset: float = 0.0) -> None:
        self.weight = nnx.Param(jnp.zeros((size,), dtype), axes=(None,))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., size]
        return rms_norm(x, self.weight[...], self.eps, offset=self.offset)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, on normalised heads where there are norms."""

    def __init__(
        self,
        config: Widths,
        dtype: jnp.dtype,
        *,
        sliding_window: int | None,  # keys seen, the token's own included
        scale: float | None = None,  # default: the root of the head size, inverted
        soft_cap: float | None = None,
        has_qkv_bias: bool = False,
        has_output_bias: bool = False,
        head_norm: Callable[[], Norm] | None = None,  # makes the norm of queries, and that of keys
    ) -> None:
        hidden = ("hidden", config.hidden_size)
        heads = ("heads", config.num_heads * config.head_dim)
        kv_heads = ("kv_heads", config.num_kv_heads * config.head_dim)
        self.q_proj = Linear(heads, hidden, dtype, has_bias=has_qkv_bias)
        self.k_proj = Linear(kv_heads, hidden, dtype, has_bias=has_qkv_bias)
        self.v_proj = Linear(kv_heads, hidden, dtype, has_bias=has_qkv_bias)
        self.o_proj = Linear(hidden, heads, dtype, has_bias=has_output_bias)
        self.q_norm = None if head_norm is None else head_norm()
        self.k_norm = None if head_norm is None else head_norm()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5 if scale is None else scale
        self.soft_cap = soft_cap
        self.sliding_window = sliding_window

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
            scale=self.scale,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
        )
        return self.o_proj(out.reshape(tokens, -1)), cache


class Mlp(nnx.Module):
    """A gated feed-forward: SwiGLU, or another activation (https://arxiv.org/abs/2002.05202)."""

    def __init__(
        self,
        config: Widths,
        dtype: jnp.dtype,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    ) -> None:
        hidden, ffw = ("hidden", config.hidden_size), ("ffw", config.ffw_size)
        self.gate_proj = Linear(ffw, hidden, dtype)
        self.up_proj = Linear(ffw, hidden, dtype)
        self.down_proj = Linear(hidden, ffw, dtype)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:  # [tokens, hidden]
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each on a normalised residual."""

    def __init__(self, config: Widths, attention: Attention, dtype: jnp.dtype) -> None:
        self.input_layernorm = Norm(config.hidden_size, config.norm_eps, dtype)
        self.self_attn = attention
        self.post_attention_layernorm = Norm(config.hidden_size, config.norm_eps, dtype)
        self.mlp = Mlp(config, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, batch: Batch, cache: LayerState
    ) -> tuple[jax.Array, LayerState]:  # [tokens, hidden]
        out, cache = self.self_attn(self.input_layernorm(x), angles, batch, cache)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nnx.Module):
    """Embedding, layers and final norm; the head belongs to the family's model."""

    def __init__(
        self, config: Widths, layers: Sequence[DecoderLayer], norm: Norm, dtype: jnp.dtype
    ) -> None:
        self.embed_tokens = Embedding(config, dtype)
        self.layers = nnx.List(layers)
        self.norm = norm

    def embed(self, batch: Batch, dtype: jnp.dtype) -> jax.Array:  # [tokens, hidden]
        """Returns the rows of the step's tokens in the type that flows between layers."""
        weight = self.embed_tokens.weight[...]
        if parts_along("vocab") == 1:
            return weight[batch.tokens].astype(dtype)
        num_tokens = weight.shape[0]
        local = local_tokens(batch.tokens, num_tokens)
        rows = weight[jnp.minimum(local, num_tokens - 1)].astype(dtype)
        is_here = (local < num_tokens)[:, None]
        return sum_over(jnp.where(is_here, rows, 0), "vocab")

    def visit(
        self,
        x: jax.Array,  # [tokens, hidden]
        angles: Iterable[Angles],  # of each layer
        batch: Batch,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:  # [tokens, hidden], before the final norm
        """Runs the layers in order."""
        states = []
        for layer, layer_angles, state in zip(self.layers, angles, cache, strict=True):
            with jax.named_scope("layer"):
                x, state = layer(x, layer_angles, batch, state)
            states.append(state)
        return x, tuple(states)


def forward(
    config: RotaryWidths,
    decoder: Decoder,
    batch: Batch,
    cache: Cache,
    *,
    dtype: jnp.dtype,  # of what flows between layers
) -> tuple[jax.Array, Cache]:  # [tokens, hidden], before the final norm
    """Computes the step's tokens in a model whose layers all rotate alike."""
    frequencies = inverse_frequencies(config.head_dim, config.rope.theta, config.rope.scaling)
    angles = [rope_angles(batch.positions, frequencies)] * config.num_layers
    return decoder.visit(decoder.embed(batch, dtype), angles, batch, cache)


def head_of(config: Widths, dtype: jnp.dtype) -> Linear:
    """Returns a head of its own, for a model whose head is not the embedding."""
    return Linear(("vocab", config.vocab_size), ("hidden", config.hidden_size), dtype)


def head_logits(
    config: Widths,
    decoder: Decoder,
    head: Linear | None,  # None: the embedding
    hidden: jax.Array,  # [rows, hidden]
) -> jax.Array:  # [rows, vocab part] f32
    """Returns the logits of the tokens that follow the given rows.

    The vocabulary is padded to whole blocks on each device, with tokens that cannot be chosen.
    """
    weight = (decoder.embed_tokens if head is None else head).weight
    with jax.named_scope("lm_head"):
        logits = matmul_f32(decoder.norm(hidden), weight[...])
    num_tokens = logits.shape[1]
    if num_tokens * parts_along("vocab") == config.vocab_size:
        return logits
    token = first_token(num_tokens) + jnp.arange(num_tokens, dtype=jnp.int32)
    return jnp.where(token[None] < config.vocab_size, logits, -jnp.inf)
