"""How each GGUF architecture reads in Hugging Face terms: configuration keys and tensor names.

A new architecture is a row in `FAMILIES`. Host only: imports no jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Metadata that means the same for every architecture; keys follow "<architecture>.".
COMMON_CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}

# "{i}" stands for a layer; ".weight" and ".bias" are appended.
COMMON_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One GGUF architecture in Hugging Face terms."""

    architecture: str
    model_type: str
    constants: Mapping[str, object]  # config values that GGUF does not store
    config: Mapping[str, str] = field(default_factory=lambda: COMMON_CONFIG)
    names: Mapping[str, str] = field(default_factory=lambda: COMMON_NAMES)
    # GGUF names whose rows hold each head's halves interleaved, mapped to the config key with
    # the number of heads: llama.cpp rotates neighbouring pairs, Hugging Face rotates halves.
    interleaved: Mapping[str, str] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        constants={"hidden_act": "silu"},
        interleaved={
            "blk.{i}.attn_q": "num_attention_heads",
            "blk.{i}.attn_k": "num_key_value_heads",
        },
    ),
}

# Texts that end generation in some family, where the file marks them as control tokens. The list
# is llama.cpp's (llama-vocab.cpp, special_eog_ids).
END_TOKENS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "<|end_of_text|>",
        "<end_of_utterance>",
    }
)

# general.sampling.* -> generation_config.json
SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
