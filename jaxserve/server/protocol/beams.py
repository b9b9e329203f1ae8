"""What goes with `use_beam_search`: beams are ranked by the raw distribution, unbent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxserve.errors import RequestError

if TYPE_CHECKING:
    from jaxserve.server.protocol.common import GenerationFields

# Each with the values that change nothing. A temperature of 1 leaves the distribution as it is,
# and 0 is what a search for the likeliest text means anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (None, False),
    "temperature": (None, 0, 1),
    "top_p": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_tokens": (None, 0),
    "stop": (None, [], ""),
    "stop_token_ids": (None, []),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "repetition_detection": (None,),
    "structured_outputs": (None,),
    "response_format": (None, {"type": "text"}),
}


def check_beams(body: GenerationFields) -> None:
    """Raises `RequestError` for a field that a beam search cannot honour, or that needs one."""
    if not body.use_beam_search:
        if body.length_penalty not in (None, 1):
            raise RequestError("length_penalty needs use_beam_search", param="length_penalty")
        return
    for name, neutral in NEUTRAL.items():
        if getattr(body, name) not in neutral:
            raise RequestError(f"{name} does not go with use_beam_search", param=name)
    if getattr(body, "echo", None) and getattr(body, "logprobs", None) not in (None, False):
        raise RequestError("echo with logprobs does not go with use_beam_search", param="echo")
