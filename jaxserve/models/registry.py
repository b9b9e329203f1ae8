"""Which architecture names are supported, and by which module."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxserve.errors import WeightError
from jaxserve.models.gemma3 import Gemma3, Gemma3Config
from jaxserve.models.llama import Llama, LlamaConfig
from jaxserve.models.mixtral import Mixtral, MixtralConfig
from jaxserve.models.qwen import Qwen, QwenConfig
from jaxserve.models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model class and the config it is built from."""

    config: Any  # has `from_hf`
    model: Callable[..., nnx.Module]  # of the config, the weights' and the activations' type


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(config=LlamaConfig, model=Llama),
    "MistralForCausalLM": Family(config=LlamaConfig, model=Llama),
    "Qwen2ForCausalLM": Family(config=QwenConfig, model=Qwen),
    "Qwen3ForCausalLM": Family(config=QwenConfig, model=Qwen),
    "Qwen3MoeForCausalLM": Family(config=Qwen3MoeConfig, model=Qwen3Moe),
    "MixtralForCausalLM": Family(config=MixtralConfig, model=Mixtral),
    "Gemma3ForCausalLM": Family(config=Gemma3Config, model=Gemma3),
}


def family_for(config: dict[str, Any]) -> Family:
    """Returns the family of a Hugging Face config; WeightError names the nearest supported."""
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    near = difflib.get_close_matches(names[0] if names else "", FAMILIES, n=3, cutoff=0.3)
    supported = ", ".join(near or FAMILIES)
    raise WeightError(f"config.json: architecture {names} is not supported; supported: {supported}")
