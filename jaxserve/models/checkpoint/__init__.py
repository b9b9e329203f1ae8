"""Reads checkpoints: safetensors folders, GGUF files, the embedded demo model.

Host only: imports no jax.
"""

from __future__ import annotations

from pathlib import Path

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import Checkpoint, TokenizerFiles, WeightFormat
from jaxserve.models.checkpoint.experts import ExpertCheckpoint, has_experts
from jaxserve.models.checkpoint.gguf import GgufCheckpoint
from jaxserve.models.checkpoint.gguf_tokenizer import gguf_tokenizer_files
from jaxserve.models.checkpoint.hub import resolve, resolve_config
from jaxserve.models.checkpoint.quantized import QuantizedCheckpoint
from jaxserve.models.checkpoint.safetensors import SafetensorsCheckpoint
from jaxserve.models.checkpoint.tokenizer_folder import folder_tokenizer_files

__all__ = [
    "Checkpoint",
    "QuantizedCheckpoint",
    "TokenizerFiles",
    "WeightFormat",
    "open_checkpoint",
    "resolve",
    "resolve_config",
    "tokenizer_files",
]


def open_checkpoint(path: Path, *, has_weights: bool = True) -> Checkpoint:
    """Opens a folder of safetensors or a .gguf file and checks every header in it.

    Without `has_weights`, a folder need hold no more than config.json. Raises `WeightError`, naming
    the file and the tensor, for anything truncated, corrupt or unsupported, before any weight is
    read.
    """
    if not path.is_dir():
        return GgufCheckpoint(path)
    checkpoint = SafetensorsCheckpoint(path, has_weights=has_weights)
    is_quantized = bool(checkpoint.config.get("quantization_config"))
    if not is_quantized and not has_experts(checkpoint):
        return checkpoint
    try:
        if not is_quantized:
            return ExpertCheckpoint(checkpoint)
        if has_experts(checkpoint):
            raise WeightError(
                f"{path}: experts that are stored quantised (config.json's quantization_config) "
                "are not supported; load the 16-bit checkpoint with --quantization"
            )
        return QuantizedCheckpoint(checkpoint)
    except BaseException:
        checkpoint.close()
        raise


def tokenizer_files(path: Path) -> TokenizerFiles:
    """Returns what a model folder or .gguf file says about its tokenizer, or `WeightError`."""
    return folder_tokenizer_files(path) if path.is_dir() else gguf_tokenizer_files(path)
