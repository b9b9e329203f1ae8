"""Reads what Hugging Face configs have in common, refusing whatever would go unheeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.errors import WeightError


def refuse_unless(config: dict[str, Any], handled: Mapping[str, object]) -> None:
    """Raises WeightError for a field that is stated and is not the one value handled."""
    for key, value in handled.items():
        if config.get(key) is not None and config[key] != value:
            raise WeightError(
                f"config.json: {key} = {config[key]!r} is not supported; supported: {value!r}"
            )


def layer_windows(
    config: dict[str, Any],
    window: int | None,  # of the layers that slide
    is_sliding: Callable[[int], bool],  # of the layer's index, where `layer_types` is not stated
) -> tuple[int | None, ...]:
    """Returns the sliding window of each layer, None where it sees everything."""
    num_layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or [
        "sliding_attention" if is_sliding(layer) else "full_attention"
        for layer in range(num_layers)
    ]
    if len(kinds) != num_layers:
        raise WeightError(f"config.json: {len(kinds)} layer_types for {num_layers} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise WeightError(
                f"config.json: layer_types holds {kind!r}; "
                "supported: full_attention, sliding_attention"
            )
    if "sliding_attention" in kinds and (type(window) is not int or window < 1):
        raise WeightError(f"config.json: sliding_window = {window!r}, but layers slide")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_experts(num_experts: object, experts_per_token: object) -> None:
    """Raises WeightError for numbers of experts that no router can have."""
    if type(num_experts) is not int or num_experts < 1:
        raise WeightError(f"config.json: {num_experts!r} experts; there must be at least 1")
    if type(experts_per_token) is not int or not 1 <= experts_per_token <= num_experts:
        raise WeightError(
            f"config.json: num_experts_per_tok = {experts_per_token!r}; "
            f"it must be 1 to {num_experts}, the number of experts"
        )
