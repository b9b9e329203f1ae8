"""jaxserve: an inference engine for language models on TPU, GPU and CPU.

Importing it imports no jax; the names below load what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.beam_search import BeamSearchParams
    from jaxserve.engine.repetition import RepetitionDetection
    from jaxserve.engine.request import SamplingParams
    from jaxserve.llm import LLM, generate
    from jaxserve.outputs import CompletionOutput, RequestOutput
    from jaxserve.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "RepetitionDetection",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
    "generate",
]

_HOMES = {
    "BeamSearchParams": "jaxserve.beam_search",
    "LLM": "jaxserve.llm",
    "generate": "jaxserve.llm",
    "RepetitionDetection": "jaxserve.engine.repetition",
    "SamplingParams": "jaxserve.engine.request",
    "RequestOutput": "jaxserve.outputs",
    "StructuredOutputsParams": "jaxserve.structured_outputs",
    "CompletionOutput": "jaxserve.outputs",
}


def __getattr__(name: str) -> Any:
    """Returns a public name, importing its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
