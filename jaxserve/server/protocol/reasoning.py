"""`reasoning_effort`, as chat templates understand it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jaxserve.errors import RequestError

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_EFFORT, _SWITCHES = "reasoning_effort", ("enable_thinking", "thinking")


def template_variables(
    effort: Effort | None,
    given: Mapping[str, Any] | None,  # chat_template_kwargs, which go first
    template: str,
) -> dict[str, Any]:
    """Returns the template's variables; raises `RequestError` if it knows nothing of an effort.

    As in vLLM a template that can only switch thinking off and on takes every effort but none for
    on.
    """
    variables = dict(given or {})
    if effort is None:
        return variables
    names = [name for name in (_EFFORT, *_SWITCHES) if name in template]
    if not names and effort != "none":
        raise RequestError(
            f"reasoning_effort is {effort}; this model's chat template knows no such setting",
            param="reasoning_effort",
        )
    return {
        **{name: effort if name == _EFFORT else effort != "none" for name in names},
        **variables,
    }
