"""What a checkpoint offers its readers: configuration, tensors by slice, tokenizer files.

Host only: imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import numpy as np

from jaxserve.errors import WeightError

# What number in a weight's `zero` stands for one level of its data, as `ops.quantization` has it.
ZERO_STEPS = {"int4": 8, "int8": 1}

Index = tuple[slice, ...]  # one slice for each dimension, step 1; as jax hands them to callbacks


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How a matrix `[out, in]` is quantised: `rows` times `columns` entries share a scale."""

    type: Literal["int4", "int8", "float8_e4m3fn"]
    rows: int = 1
    columns: int | None = None  # None: all
    has_zero: bool = False
    has_order: bool = False  # columns are stored in another order (GPTQ's activation order)
    activations: Literal["float", "dynamic", "static"] = "float"  # may be quantised too, so

    def num_groups(self, in_size: int) -> int:
        """Returns how many scales a row has; WeightError where columns do not divide `in_size`."""
        if self.columns is None:
            return 1
        if in_size % self.columns:
            raise WeightError(
                f"{self.columns} columns share a scale; they do not divide a width of {in_size}"
            )
        return in_size // self.columns


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A quantised matrix as `ops.quantization.QuantizedWeight` holds it, on the host."""

    data: np.ndarray  # [out, in]
    scale: np.ndarray  # [groups, out / rows, rounded up] f32
    zero: np.ndarray | None = None  # [groups, out] i8, `ZERO_STEPS` to a level
    order: np.ndarray | None = None  # [in] i32
    input_scale: np.ndarray | None = None  # [] f32


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
