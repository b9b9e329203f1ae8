"""How one model's text becomes messages: its reasoning and tool call formats together.

Host only: imports no jax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from jaxserve.errors import ConfigError
from jaxserve.text import reasoning, tool_parsers
from jaxserve.text.message import MessageReader
from jaxserve.text.reasoning import ReasoningFormat, State, state_after, thinking
from jaxserve.text.source import Content, Parse, Source
from jaxserve.text.tool_parsers import ToolFormat, harmony
from jaxserve.text.tool_parsers.tools import Tools

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MessageFormat:
    """What a model's answers are made of. None: it has no such thing, or no known form of it."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None

    @property
    def tools_name(self) -> str:
        """The name of the tool call format, or none."""
        return "none" if self.tools is None else self.tools.name

    @property
    def reasoning_name(self) -> str:
        """The name of the reasoning format, or none."""
        return "none" if self.reasoning is None else self.reasoning.name

    def marks_for(self, *, has_tools: bool) -> tuple[str, ...]:
        """Returns the special tokens that must be part of the text."""
        marks: tuple[str, ...] = ()
        if self.reasoning is reasoning.HARMONY:
            marks += harmony.MARKS
        elif self.reasoning is not None:
            marks += self.reasoning.marks
        if has_tools and self.tools is not None:
            marks += self.tools.marks
        return marks

    def reader(
        self,
        prompt: str,
        tools: Tools | None,  # None leaves calls as they are, content
        *,
        prefill: str | None = None,  # the text of the message that the answer continues
        max_calls: int | None = None,
        has_reasoning: bool = True,  # False drops it
    ) -> MessageReader | None:
        """Returns what reads one answer; None if all of it is content."""
        format = self.tools if tools is not None else None
        if format is None and self.reasoning is None:
            return None
        return MessageReader(
            self._parser(prompt, tools, prefill),
            new_id=tool_parsers.new_id if format is None else format.new_id,
            max_calls=max_calls,
            has_reasoning=has_reasoning,
        )

    def _parser(
        self, prompt: str, tools: Tools | None, prefill: str | None
    ) -> Callable[[Source], Parse[None]]:
        format = self.tools if tools is not None else None
        thoughts = self.reasoning
        if format is tool_parsers.HARMONY or thoughts is reasoning.HARMONY:
            known = tools if format is tool_parsers.HARMONY else None
            return lambda source: harmony.parse(source, known)
        state: State = "closed"
        if thoughts is not None:
            state = state_after(thoughts, prompt, prefill)

        def parse(source: Source) -> Parse[None]:
            if thoughts is not None:
                yield from thinking(
                    source, thoughts, state, format.call_start if format is not None else None
                )
            if format is not None and tools is not None:
                yield from format.parse(source, tools)
            yield from source.rest(Content)

        return parse


def message_format(
    tool_call_parser: str,  # auto, none, or a format's name
    reasoning_parser: str,
    template: str | None,  # the model's chat template, which decides "auto"
) -> MessageFormat:
    """Returns the formats of a model. Raises `ConfigError` for a name that is not known."""
    return MessageFormat(
        tools=_chosen(
            "tool_call_parser",
            tool_call_parser,
            tool_parsers.FORMATS,
            tool_parsers.format_of(template or ""),
        ),
        reasoning=_chosen(
            "reasoning_parser",
            reasoning_parser,
            reasoning.FORMATS,
            reasoning.format_of(template or ""),
        ),
    )


def _chosen(option: str, name: str, known: Mapping[str, T], fitting: T | None) -> T | None:
    if name == "auto":
        return fitting
    if name == "none":
        return None
    if name not in known:
        raise ConfigError(f"{option} is {name!r}; known: auto, none, {', '.join(sorted(known))}")
    return known[name]
