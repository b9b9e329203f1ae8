"""How a chat request's answers are read: its tools checked against the model, a reader for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.engine.request import Request
from jaxserve.errors import RequestError
from jaxserve.server.model_text import ModelText
from jaxserve.server.protocol.chat import ChatRequest
from jaxserve.server.protocol.tools import Named, ToolUse, reason_of, tool_use
from jaxserve.structured_outputs import Grammar
from jaxserve.text.message import MessageReader, Said


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The readers of one reply's samples; None where all text is content."""

    use: ToolUse | None
    readers: Sequence[MessageReader | None]

    def read(self, index: int, text: str, offsets: Sequence[int], *, final: bool) -> Said:
        """Returns what a text of sample `index` says."""
        reader = self.readers[index]
        return Said(content=text) if reader is None else reader.push(text, offsets, final=final)

    def finish_reason(self, index: int, engine_reason: str | None) -> str | None:
        """Returns why sample `index` has ended, as clients see it."""
        reader = self.readers[index]
        return reason_of(engine_reason, reader.num_calls if reader else 0, self.use)

    def num_reasoning(self) -> int:
        """Returns the reasoning tokens of all samples so far."""
        return sum(reader.num_reasoning_tokens for reader in self.readers if reader)


def tool_use_of(body: ChatRequest, text: ModelText) -> ToolUse | None:
    """Returns the request's tools. Raises `RequestError` if the model cannot use them."""
    use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    if use is None or use.choice == "none":
        return use
    source = body.chat_template
    if source is None and text.chat_template is not None:
        source = text.chat_template.source
    if source is not None and "tools" not in source:
        raise RequestError(
            "the model's chat template takes no tools; see --chat-template", param="tools"
        )
    if text.format.tools is None:
        raise RequestError(
            "nothing is known of how this model writes tool calls; see --tool-call-parser",
            param="tools",
        )
    return use


def reading_of(
    body: ChatRequest,
    use: ToolUse | None,
    text: ModelText,
    prompt: str,  # as rendered
    num_samples: int,
) -> Reading:
    """Returns how the answers to a request are read."""
    prefill = _text_of(body.messages[-1]) if body.continue_final_message else None
    readers = [
        text.format.reader(
            prompt,
            None if use is None else use.parsed,
            prefill=prefill,
            max_calls=None if use is None else use.max_calls,
            has_reasoning=body.include_reasoning is not False,
            only_marked=use is not None
            and (use.is_guaranteed or body.thinking_token_budget is not None),
        )
        for _ in range(num_samples)
    ]
    return Reading(use=use, readers=readers)


def constrained(
    requests: Sequence[Request],
    body: ChatRequest,
    use: ToolUse | None,
    text: ModelText,
    prompt: str,  # as rendered
) -> list[Request]:
    """Returns the requests with the grammar that their tools and their thinking ask for.

    One that the client asks for begins after the thinking. Raises `RequestError` for what cannot
    be guaranteed.
    """
    given = requests[0].params.grammar
    prefill = _text_of(body.messages[-1]) if body.continue_final_message else None
    if given is not None:
        _check_alone(body, use)
        after = text.format.tokens_before_answer(prompt, text.tokenizer, prefill)
        grammar = dataclasses.replace(given, start_after_tokens=after)
    else:
        found = _grammar_of(body, use, text, prompt, prefill)
        if found is None:
            return list(requests)
        if body.use_beam_search:
            raise RequestError(f"{found.param} does not go with beams", param="use_beam_search")
        grammar = found
    return [
        dataclasses.replace(request, params=dataclasses.replace(request.params, grammar=grammar))
        for request in requests
    ]


def _check_alone(body: ChatRequest, use: ToolUse | None) -> None:
    """Raises `RequestError` for what a form of the client's own leaves no room for."""
    if use is not None and use.choice not in ("auto", "none"):
        raise RequestError(
            "tool_choice and response_format both say what the answer must be",
            param="tool_choice",
        )
    if body.thinking_token_budget is not None:
        raise RequestError(
            "thinking_token_budget does not go with response_format and structured_outputs",
            param="thinking_token_budget",
        )


def _grammar_of(
    body: ChatRequest, use: ToolUse | None, text: ModelText, prompt: str, prefill: str | None
) -> Grammar | None:
    budget = body.thinking_token_budget
    if budget is not None and text.format.is_thinking_over(prompt, prefill):
        budget = None
    is_guaranteed = use is not None and use.choice != "none" and use.is_guaranteed
    param = "thinking_token_budget"
    if use is not None and use.parsed is not None and (is_guaranteed or budget is not None):
        source = text.format.grammar(
            prompt,
            use.callable,
            text.tokenizer,
            prefill=prefill,
            is_free=use.choice == "auto",
            max_calls=1 if isinstance(use.choice, Named) else use.max_calls,
            budget=budget,
        )
        if is_guaranteed:
            param = "tools" if use.choice == "auto" else "tool_choice"
    elif budget is not None:
        source = text.format.budget_grammar(prompt, budget, text.tokenizer, prefill)
    else:
        return None
    if source is None:
        raise RequestError(
            f"{_asked(body, use)} cannot be guaranteed for a model with the tool call parser "
            f"{text.format.tools_name} and the reasoning parser {text.format.reasoning_name}",
            param=param,
        )
    return Grammar(source=source, param=param)


def _asked(body: ChatRequest, use: ToolUse | None) -> str:
    """Returns what a grammar was wanted for."""
    asked = []
    if use is not None and use.choice != "none" and use.is_guaranteed:
        asked.append("strict tools" if use.choice == "auto" else "tool_choice")
    if body.thinking_token_budget is not None:
        asked.append("thinking_token_budget")
    return " with ".join(asked)


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")
