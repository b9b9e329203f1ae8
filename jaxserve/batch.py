"""The contract between engine, models and ops: what one step computes on, and the KV cache."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import flax.struct
import jax

from pallas_kernels import grouped_matmul, ragged_paged_attention
from pallas_kernels.ragged_paged_attention import LayerCache


@flax.struct.dataclass
class ScaledCache:
    """One layer's pages of 8-bit numbers; times the scales they are the keys and values.

    Each channel has a scale: Qwen2's biases make a few channels of keys a hundred times as large
    as the rest, which one scale for all would round away (int8: perplexity + 22 %).
    """

    pages: LayerCache
    k_scale: jax.Array  # [kv_heads, head_dim] f32
    v_scale: jax.Array  # [kv_heads, head_dim] f32


LayerState: TypeAlias = LayerCache | ScaledCache  # of one layer: only attention looks into it
Cache: TypeAlias = tuple[LayerState, ...]  # one entry for each layer


@flax.struct.dataclass
class Batch:
    """One step's tokens, flat and ragged. Every leaf has the bucket's shape, so programs repeat.

    Two sequences, one decoding at position 7 and one whose first three tokens are computed, in a
    bucket of 8 tokens and 4 sequences:

        tokens     9 | 5 6 7 | 0 0 0 0      cu_q_lens  0 1 4 4 4
        positions  7 | 0 1 2 | 0 0 0 0      kv_lens    8 3 0 0      counts 1 2
    """

    tokens: jax.Array  # [tokens] i32
    positions: jax.Array  # [tokens] i32, index in the sequence
    kv_lens: jax.Array  # [sequences] i32, context length with this step's tokens; 0 for padding
    page_table: jax.Array  # [sequences, pages_per_sequence] i32
    cu_q_lens: jax.Array  # [sequences + 1] i32, where each sequence's tokens begin
    counts: jax.Array  # [2] i32: sequences of one token (they come first), all sequences
    # What `ops.attention` and `ops.moe` call.
    attention: ragged_paged_attention.Backend = flax.struct.field(pytree_node=False)
    experts: grouped_matmul.Backend = flax.struct.field(pytree_node=False)


class Model(Protocol):
    """A decoder: parameters only; the cache is an argument and a result."""

    def __call__(
        self, batch: Batch, cache: Cache
    ) -> tuple[jax.Array, Cache]:  # [tokens, hidden], before the final norm
        """Computes the step's tokens and writes their keys and values."""

    def logits(
        self,
        hidden: jax.Array,  # [rows, hidden], as `__call__` returned it
    ) -> jax.Array:  # [rows, vocab part] f32, of the tokens whose logits this device computes
        """Returns the logits of the tokens that follow the given rows."""
