"""A Llama in numpy: no cache, no pages, no batch. What the engine must agree with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.checkpoints import folder_tensors


class DenseLlama:
    """The model of a folder of `write_llama_folder` without rope scaling, in float64."""

    def __init__(self, folder: Path) -> None:
        self._config = json.loads((folder / "config.json").read_text())
        self._tensors = {
            name: tensor.astype(np.float64) for name, tensor in folder_tensors(folder).items()
        }

    def logits(self, tokens: list[int]) -> np.ndarray:  # [tokens, vocab]
        """Returns the logits after each token."""
        x = self._tensors["model.embed_tokens.weight"][tokens]
        for layer in range(self._config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, prefix + "input_layernorm"), prefix)
            hidden = self._norm(x, prefix + "post_attention_layernorm")
            gate = self._linear(hidden, prefix + "mlp.gate_proj")
            up = self._linear(hidden, prefix + "mlp.up_proj")
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, prefix + "mlp.down_proj")
        is_tied = self._config["tie_word_embeddings"]
        head = "model.embed_tokens" if is_tied else "lm_head"
        return self._linear(self._norm(x, "model.norm"), head)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Returns the `count` likeliest tokens after a prompt, each from a full pass."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._tensors[f"{name}.weight"].T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self._config["rms_norm_eps"])
        return x / scale * self._tensors[f"{name}.weight"]

    def _attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        heads = self._config["num_attention_heads"]
        kv_heads = self._config["num_key_value_heads"]
        q, k, v = (
            self._linear(x, f"{prefix}self_attn.{name}_proj").reshape(len(x), count, -1)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = self._rotate(q), self._rotate(k)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,chd->hqc", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hqc,chd->qhd", weights, v).reshape(len(x), -1)
        return self._linear(out, f"{prefix}self_attn.o_proj")

    def _rotate(self, x: np.ndarray) -> np.ndarray:  # [tokens, heads, head_dim]
        half = x.shape[-1] // 2
        theta = float(self._config["rope_theta"])
        angles = np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half))[:, None]
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
