"""How each GGUF architecture reads in Hugging Face terms: configuration keys and tensor names.

A new architecture is a row in `FAMILIES`. Host only: imports no jax.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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


EXPERT_CONFIG = {
    **COMMON_CONFIG,
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}

# Stacks of all experts' matrices, as models have them.
EXPERT_NAMES = {
    **COMMON_NAMES,
    "blk.{i}.ffn_gate_inp": "model.layers.{i}.mlp.gate",
    "blk.{i}.ffn_gate_exps": "model.layers.{i}.mlp.experts.gate_proj",
    "blk.{i}.ffn_up_exps": "model.layers.{i}.mlp.experts.up_proj",
    "blk.{i}.ffn_down_exps": "model.layers.{i}.mlp.experts.down_proj",
}

_HEAD_NORMS = {
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
}

_GEMMA3_NORMS = {
    **_HEAD_NORMS,
    "output_norm": "model.norm",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "blk.{i}.post_ffw_norm": "model.layers.{i}.post_feedforward_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One GGUF architecture in Hugging Face terms."""

    architecture: str
    model_type: str
    constants: Mapping[str, object]  # config values that GGUF does not store
    config: Mapping[str, str] = field(default_factory=lambda: COMMON_CONFIG)
    optional: Mapping[str, str] = field(default_factory=dict)  # as `config`, where the file has it
    # What follows from the rest of the config.
    derived: Callable[[Mapping[str, int]], Mapping[str, object]] = lambda config: {}
    names: Mapping[str, str] = field(default_factory=lambda: COMMON_NAMES)
    # GGUF names whose rows hold each head's halves interleaved, mapped to the config key with
    # the number of heads: llama.cpp rotates neighbouring pairs, Hugging Face rotates halves.
    interleaved: Mapping[str, str] = field(default_factory=dict)
    # GGUF names whose values are 1 more than Hugging Face's, which are distances from 1.
    raised: Collection[str] = ()


def _gemma3_scale(config: Mapping[str, int]) -> Mapping[str, object]:
    # Not in the file: llama.cpp, too, knows the 27B model by its 62 layers (llama-model.cpp).
    is_27b = config["num_hidden_layers"] == 62
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": per_head if is_27b else config["head_dim"]}


_LLAMA_HEADS = {
    "blk.{i}.attn_q": "num_attention_heads",
    "blk.{i}.attn_k": "num_key_value_heads",
}

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        constants={"hidden_act": "silu"},
        interleaved=_LLAMA_HEADS,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        constants={"hidden_act": "silu"},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        constants={"hidden_act": "silu"},
        names={**COMMON_NAMES, **_HEAD_NORMS},
    ),
    "gemma3": Family(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        constants={
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        config={**COMMON_CONFIG, "attention.sliding_window": "sliding_window"},
        optional={
            "attention.sliding_window_pattern": "sliding_window_pattern",
            "rope.freq_base_swa": "rope_local_base_freq",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        derived=_gemma3_scale,
        names={**COMMON_NAMES, **_GEMMA3_NORMS},
        raised=_GEMMA3_NORMS,
    ),
}

# Of files with experts, whose architecture may be that of files without. In both, llama.cpp makes
# the weights of a token's experts sum to 1 (llama-model.cpp, build_moe_ffn).
EXPERT_FAMILIES = {
    "llama": Family(
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        constants={"hidden_act": "silu"},
        config=EXPERT_CONFIG,
        names=EXPERT_NAMES,
        interleaved=_LLAMA_HEADS,
    ),
    "qwen3moe": Family(
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        constants={"hidden_act": "silu", "norm_topk_prob": True},
        config={**EXPERT_CONFIG, "expert_feed_forward_length": "moe_intermediate_size"},
        names={**EXPERT_NAMES, **_HEAD_NORMS},
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
