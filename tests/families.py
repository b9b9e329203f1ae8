"""Writes small random checkpoints of Qwen, Mixtral and Gemma 3: Hugging Face folders, GGUF twins.

Reproducible from the seed. Host only: imports no jax.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.checkpoints import (
    add_byte_level_tokenizer,
    finish_gguf,
    folder_tensors,
    write_json,
    write_shards,
    write_tokenizer,
)

_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 320,
}

# As the Hub's config.json, but for the sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_window_layers": 1,
        "sliding_window": 7,
        "use_sliding_window": False,
    },
    "qwen3": {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_window_layers": 1,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "qwen3_moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "mlp_only_layers": [],
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "mixtral": {
        **_COMMON,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        **_COMMON,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 7,  # the sixth sees everything
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": 7,
        "sliding_window_pattern": 6,
    },
}


def write_family_folder(path: Path, family: str, *, seed: int = 0, **changes: Any) -> Path:
    """Writes a random model as a Hugging Face folder to `path` and returns `path`.

    `changes` go over the family's entry in `CONFIGS`; one that is `...` removes the key.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**CONFIGS[family], **changes}.items() if value != ...}
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 2})
    write_tokenizer(path, config["vocab_size"], config["max_position_embeddings"])
    write_shards(path, family_tensors(config, seed=seed), 1)
    return path


def family_tensors(config: dict[str, Any], *, seed: int) -> dict[str, np.ndarray]:
    """Returns random parameters by Hugging Face name.

    Matrices keep the size of activations. Norms and biases lie far enough from their initial
    values that one left at them, or left out, shows.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in family_shapes(config).items():
        noise = rng.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            is_distance = config["model_type"] == "gemma3_text"
            tensors[name] = 0.2 * noise + np.float32(0 if is_distance else 1)
        else:
            tensors[name] = noise * np.float32(0.5 if len(shape) == 1 else shape[1] ** -0.5)
    return tensors


def family_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter."""
    kind, hidden = config["model_type"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, ffw = config.get("head_dim", hidden // heads), config["intermediate_size"]
    attention = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
    }
    mlp = {
        "mlp.gate_proj": (ffw, hidden),
        "mlp.up_proj": (ffw, hidden),
        "mlp.down_proj": (hidden, ffw),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if kind == "gemma3_text":
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if kind not in ("qwen2", "mixtral"):
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    biased = set(attention)
    if kind == "qwen2":
        biased.remove("self_attn.o_proj")
    elif not config.get("attention_bias"):
        biased.clear()
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        matrices = {**attention, **(expert_shapes(config) if has_experts(config, layer) else mlp)}
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
        shapes |= {f"{prefix}{name}.bias": matrices[name][:1] for name in sorted(biased)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def has_experts(config: dict[str, Any], layer: int) -> bool:
    """Returns whether a layer is a mixture of experts."""
    if config["model_type"] == "qwen3_moe":
        is_next = (layer + 1) % config["decoder_sparse_step"] == 0
        return is_next and layer not in config["mlp_only_layers"]
    return bool(config["model_type"] == "mixtral")


def expert_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each matrix of a mixture, by the checkpoint's names."""
    hidden = config["hidden_size"]
    if config["model_type"] == "mixtral":
        part, names = "block_sparse_moe", ("w1", "w3", "w2")
        count, ffw = config["num_local_experts"], config["intermediate_size"]
    else:
        part, names = "mlp", ("gate_proj", "up_proj", "down_proj")
        count, ffw = config["num_experts"], config["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {f"{part}.gate": (count, hidden)}
    for expert in range(count):
        for name, shape in zip(names, ((ffw, hidden), (ffw, hidden), (hidden, ffw)), strict=True):
            shapes[f"{part}.experts.{expert}.{name}"] = shape
    return shapes


def write_family_gguf(path: Path, folder: Path) -> Path:
    """Writes the float32 GGUF twin of a folder to `path` and returns `path`.

    As llama.cpp's converter does: Gemma's norms are stored raised by 1, and neither its pattern of
    layers nor the theta of those that slide is stored.
    """
    config = json.loads((folder / "config.json").read_text())
    model_type = config["model_type"]
    # llama.cpp has Mixtral as a Llama with experts.
    kind = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}.get(
        model_type, model_type.removesuffix("_text")
    )
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if kind == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        if config["final_logit_softcapping"]:
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if scaling := config.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    add_byte_level_tokenizer(writer, folder)
    architecture = gguf.MODEL_ARCH[kind.upper()]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in sorted(_as_llama_cpp_has_them(folder, config).items()):
        raised = 1 if kind == "gemma3" and name.endswith("norm.weight") else 0
        values = tensor.astype(np.float32) + np.float32(raised)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    finish_gguf(writer)
    return path


def _as_llama_cpp_has_them(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the folder's tensors, experts stacked, and Mixtral's heads interleaved as Llama's."""
    tensors: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in folder_tensors(folder).items():
        if match := re.fullmatch(r"(.+\.experts)\.\d+\.(.+)", name):
            stacks.setdefault(f"{match[1]}.{match[2]}", []).append(tensor)
        elif config["model_type"] == "mixtral" and re.search(r"[qk]_proj", name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            halves = tensor.reshape(config[key], 2, -1, tensor.shape[1])
            tensors[name] = halves.swapaxes(1, 2).reshape(tensor.shape)
        else:
            tensors[name] = tensor
    return tensors | {name: np.stack(parts) for name, parts in stacks.items()}
