"""Qwen, Mixtral and Gemma 3 in numpy: no cache, no pages, no batch. What models must agree with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import folder_tensors


class DenseFamily:
    """The model of a folder of `write_family_folder`, in float64. Rope scaling: linear."""

    def __init__(self, folder: Path) -> None:
        self._config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._tensors = {
            name: tensor.astype(np.float64) for name, tensor in folder_tensors(folder).items()
        }
        self._is_gemma = self._config["model_type"] == "gemma3_text"

    def logits(self, tokens: list[int]) -> np.ndarray:  # [tokens, vocab]
        """Returns the logits after each token."""
        x = self._tensors["model.embed_tokens.weight"][tokens]
        if self._is_gemma:
            x = x * math.sqrt(self._config["hidden_size"])
        for layer in range(self._config["num_hidden_layers"]):
            x = self._layer(x, layer)
        is_tied = self._config["tie_word_embeddings"]
        head = "model.embed_tokens" if is_tied else "lm_head"
        logits = self._linear(self._norm(x, "model.norm"), head)
        return _capped(logits, self._config.get("final_logit_softcapping"))

    def _layer(self, x: np.ndarray, layer: int) -> np.ndarray:
        prefix = f"model.layers.{layer}."
        out = self._attention(self._norm(x, prefix + "input_layernorm"), layer)
        if self._is_gemma:
            x = x + self._norm(out, prefix + "post_attention_layernorm")
            out = self._mlp(self._norm(x, prefix + "pre_feedforward_layernorm"), prefix)
            return x + self._norm(out, prefix + "post_feedforward_layernorm")
        x = x + out
        return x + self._mlp(self._norm(x, prefix + "post_attention_layernorm"), prefix)

    def _mlp(self, x: np.ndarray, prefix: str) -> np.ndarray:
        for part in ("mlp.", "block_sparse_moe."):
            if f"{prefix}{part}gate.weight" in self._tensors:
                return self._mixture(x, prefix + part)
        gate = self._linear(x, prefix + "mlp.gate_proj")
        if self._is_gemma:
            inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            gate = 0.5 * gate * (1 + np.tanh(inner))
        else:
            gate = gate / (1 + np.exp(-gate))
        return self._linear(
            gate * self._linear(x, prefix + "mlp.up_proj"), prefix + "mlp.down_proj"
        )

    def _mixture(self, x: np.ndarray, prefix: str) -> np.ndarray:
        """Every expert on every token, weighted: one that a token is not routed to by 0."""
        config, logits = self._config, self._linear(x, prefix + "gate")
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        least = np.sort(probabilities, -1)[:, -config["num_experts_per_tok"], None]
        weights = np.where(probabilities >= least, probabilities, 0)
        if config.get("norm_topk_prob", True):
            weights /= weights.sum(-1, keepdims=True)
        is_mixtral = config["model_type"] == "mixtral"
        names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        out = np.zeros_like(x)
        for expert in range(logits.shape[1]):
            gate, up, down = (f"{prefix}experts.{expert}.{name}" for name in names)
            inner = self._linear(x, gate)
            inner = inner / (1 + np.exp(-inner)) * self._linear(x, up)
            out += weights[:, expert, None] * self._linear(inner, down)
        return out

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._tensors[f"{name}.weight"].T + self._tensors.get(f"{name}.bias", 0.0)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self._config["rms_norm_eps"])
        return x / scale * (self._tensors[f"{name}.weight"] + self._is_gemma)

    def _attention(self, x: np.ndarray, layer: int) -> np.ndarray:
        config, prefix = self._config, f"model.layers.{layer}.self_attn."
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        q, k, v = (
            self._linear(x, f"{prefix}{name}_proj").reshape(len(x), count, -1)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if f"{prefix}q_norm.weight" in self._tensors:
            q, k = self._norm(q, prefix + "q_norm"), self._norm(k, prefix + "k_norm")
        q, k = self._rotate(q, layer), self._rotate(k, layer)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scale = config.get("query_pre_attn_scalar", q.shape[-1]) ** -0.5
        scores = np.einsum("qhd,chd->hqc", q, k) * scale
        scores = _capped(scores, config.get("attn_logit_softcapping"))
        scores = np.where(self._is_seen(len(x), layer), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hqc,chd->qhd", weights, v).reshape(len(x), -1)
        return self._linear(out, prefix + "o_proj")

    def _slides(self, layer: int) -> bool:
        config = self._config
        if "layer_types" in config:
            return bool(config["layer_types"][layer] == "sliding_attention")
        if config["model_type"] == "mixtral":
            return config["sliding_window"] is not None
        if self._is_gemma:
            return bool((layer + 1) % config["sliding_window_pattern"])
        return bool(config["use_sliding_window"] and layer >= config.get("max_window_layers", 0))

    def _is_seen(self, count: int, layer: int) -> np.ndarray:  # [queries, keys]
        distance = np.arange(count)[:, None] - np.arange(count)
        window = self._config["sliding_window"] if self._slides(layer) else count
        return (distance >= 0) & (distance < window)

    def _rotate(self, x: np.ndarray, layer: int) -> np.ndarray:  # [tokens, heads, head_dim]
        half = x.shape[-1] // 2
        is_local = self._is_gemma and self._slides(layer)
        theta = self._config["rope_local_base_freq" if is_local else "rope_theta"]
        scaling = (not is_local and self._config.get("rope_scaling")) or {"factor": 1.0}
        turns = np.arange(len(x)) / scaling["factor"]
        angles = np.outer(turns, theta ** (-np.arange(half) / half))[:, None]
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)
