"""What a checkpoint offers its readers: configuration, tensors by slice, tokenizer files.

Host only: imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np

Index = tuple[slice, ...]  # one slice for each dimension, step 1; as jax hands them to callbacks


class Checkpoint(Protocol):
    """An opened, validated checkpoint in Hugging Face terms. A context manager.

    `config` holds config.json, or the same built from GGUF metadata; `generation_config` holds
    generation_config.json, or {}. `read` may be called from several threads.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    names: tuple[str, ...]  # Hugging Face parameter names; matrices are [out, in]

    def __enter__(self) -> Self:
        """Returns itself."""

    def __exit__(self, *exc: object) -> None:
        """Closes the files."""

    def close(self) -> None:
        """Closes the files; `read` must not be called after."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole tensor. An unknown name raises `WeightError`."""

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns the tensor, or the part that `index` names, as a new array of its own.

        The type is the stored one; quantised GGUF types come back as float32. Only the part asked
        for is read. A file that changed since it was opened raises `WeightError`.
        """


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a checkpoint says about its tokenizer.

    `tokenizer_json` alone fixes the ids: its post-processor adds the begin and end tokens, so
    `add_bos_token` and `add_eos_token` only repeat what the files state (None: nothing stated).
    """

    tokenizer_json: str  # the JSON of the `tokenizers` library
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    chat_template: str | None = None  # Jinja source
    model_max_length: int | None = None  # tokens
    tokenizer_config: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json, or {}
