"""What Hugging Face transformers computes in float32, on torch: the full tier only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class Oracle:
    """The model of a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        import torch  # not in the fast tier
        import transformers

        self._torch = torch
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )

    def logits(self, tokens: list[int]) -> np.ndarray:  # [tokens, vocab] f32
        """Returns the logits after each token."""
        with self._torch.no_grad():
            logits: np.ndarray = self._model(self._torch.tensor([tokens])).logits[0].numpy()
        return logits

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Returns the `count` likeliest tokens after a prompt, each from a full pass."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def assert_close(
    actual: np.ndarray,  # [tokens, vocab]
    expected: np.ndarray,  # [tokens, vocab]
) -> None:
    """Asserts that no logit is off by 1e-4 of its position's largest."""
    error = np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)
    assert error.max() < 1e-4, error
