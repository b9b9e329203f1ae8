"""How one model's text becomes messages: its reasoning and tool call formats together.

Host only: imports no jax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from jaxserve.text import reasoning, tool_parsers
from jaxserve.text.message import MessageReader
from jaxserve.text.reasoning import ReasoningFormat, State, state_after, thinking
from jaxserve.text.source import Content, Parse, Source
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tool_parsers import ToolFormat, harmony
from jaxserve.text.tool_parsers.grammar import Surface, Thinking, call_grammar, text_grammar
from jaxserve.text.tool_parsers.tools import Tools

T = TypeVar("T")

HARMONY_THINKING = Thinking(
    start=f"{harmony.CHANNEL}analysis{harmony.MESSAGE}",
    ends=(f"{harmony.END}{harmony.START}assistant",),
)


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

    @property
    def thinking_marks(self) -> tuple[str, ...]:
        """Tokens that grammars must be able to tell from text, whatever the tokenizer says."""
        return () if self.reasoning is None else self.reasoning.marks

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
        only_marked: bool = False,  # a grammar sees to the marks of calls
    ) -> MessageReader | None:
        """Returns what reads one answer; None if all of it is content."""
        format = self.tools if tools is not None else None
        if format is None and self.reasoning is None:
            return None
        return MessageReader(
            self._parser(prompt, tools, prefill, only_marked),
            new_id=tool_parsers.new_id if format is None else format.new_id,
            max_calls=max_calls,
            has_reasoning=has_reasoning,
        )

    def grammar(
        self,
        prompt: str,
        tools: Tools,  # those that may be called
        tokenizer: Tokenizer,
        *,
        prefill: str | None = None,
        is_free: bool = False,  # there need be no call; those that there are must fit
        max_calls: int | None = None,
        budget: int | None = None,  # of tokens to think
    ) -> str | None:
        """Returns the grammar of answers whose calls fit their tools' schemas.

        None if this format has no form that a grammar could hold the model to.
        """
        surface = self._surface(tokenizer, is_free)
        thinking = self._thinking(prompt, prefill, budget)
        is_unlimited = budget is not None and thinking is None
        if surface is None or is_unlimited or not self._can_constrain(tokenizer, thinking):
            return None
        return call_grammar(
            surface,
            tools,
            special_id=lambda mark: self._special_id(tokenizer, mark),
            marks=self.marks_for(has_tools=True),
            thinking=thinking,
            is_free=is_free,
            max_calls=max_calls,
        )

    def budget_grammar(
        self, prompt: str, budget: int, tokenizer: Tokenizer, prefill: str | None = None
    ) -> str | None:
        """Returns the grammar of any answer that thinks for so many tokens at most.

        None if the thinking's end is no single token, or nothing is known of any thinking.
        """
        thinking = self._thinking(prompt, prefill, budget)
        if thinking is None or not self._can_constrain(tokenizer, thinking):
            return None
        return text_grammar(
            thinking,
            special_id=lambda mark: self._special_id(tokenizer, mark),
            marks=self.thinking_marks,
        )

    def is_thinking_over(self, prompt: str, prefill: str | None = None) -> bool:
        """True if the prompt says that no thinking comes."""
        format = self.reasoning
        if format is None or format is reasoning.HARMONY:
            return False
        return state_after(format, prompt, prefill) == "closed"

    def _can_constrain(self, tokenizer: Tokenizer, thinking: Thinking | None) -> bool:
        if tokenizer.pieces is None:
            return False
        if thinking is None or thinking.budget is None:
            return True
        return self._special_id(tokenizer, thinking.ends[0]) is not None

    def _special_id(self, tokenizer: Tokenizer, mark: str) -> int | None:
        token = tokenizer.token_of(mark)
        is_special = token in tokenizer.special_ids or mark in self.thinking_marks
        return token if is_special else None

    def _surface(self, tokenizer: Tokenizer, is_free: bool) -> Surface | None:
        for surface in () if self.tools is None else self.tools.surfaces:
            is_there = surface.needs is None or tokenizer.token_of(surface.needs) is not None
            if is_there and (surface.trigger or not is_free):
                return surface
        return None

    def _thinking(self, prompt: str, prefill: str | None, budget: int | None) -> Thinking | None:
        """Returns what thinking an answer may or must begin with."""
        format = self.reasoning
        if format is None:
            return None
        if format is reasoning.HARMONY:
            return dataclasses.replace(HARMONY_THINKING, budget=budget)
        state = state_after(format, prompt, prefill)
        if state == "closed":
            return None
        is_open = state == "open" or format.is_open_at_start
        return Thinking(
            start=format.starts[0] if state == "unknown" else "",
            ends=format.ends,
            is_start_certain=not is_open,
            is_certain=is_open,
            budget=budget,
        )

    def tokens_before_answer(
        self, prompt: str, tokenizer: Tokenizer, prefill: str | None = None
    ) -> tuple[int, ...]:
        """Returns the tokens that end the thinking, if the answer begins with some; else none."""
        format = self.reasoning
        if format is None:
            return ()
        if format is reasoning.HARMONY:
            marks = harmony.CHANNEL, harmony.MESSAGE
            channel, message = (self._special_id(tokenizer, mark) for mark in marks)
            final = tokenizer.encode("final", add_special_tokens=False)
            return () if channel is None or message is None else (channel, *final, message)
        state = state_after(format, prompt, prefill)
        # A model that may as well begin with its answer is held to the form at once.
        is_open = state == "open" or (state == "unknown" and format.is_open_at_start)
        end = tokenizer.token_of(format.ends[0])
        return (end,) if is_open and end is not None else ()

    def _parser(
        self, prompt: str, tools: Tools | None, prefill: str | None, only_marked: bool
    ) -> Callable[[Source], Parse[None]]:
        format = self.tools if tools is not None else None
        thoughts = self.reasoning
        if format is tool_parsers.HARMONY or thoughts is reasoning.HARMONY:
            known = tools if format is tool_parsers.HARMONY else None
            return lambda source: harmony.parse(source, known)
        read_calls = None if format is None else format.parse
        if format is not None and format.parse_marked is not None and only_marked:
            read_calls = format.parse_marked
        state: State = "closed"
        if thoughts is not None:
            state = state_after(thoughts, prompt, prefill)

        def parse(source: Source) -> Parse[None]:
            if thoughts is not None:
                yield from thinking(
                    source, thoughts, state, format.call_start if format is not None else None
                )
            if read_calls is not None and tools is not None:
                yield from read_calls(source, tools)
            yield from source.rest(Content)

        return parse


def message_format(
    tool_call_parser: str,  # auto, none, or a format's name
    reasoning_parser: str,
    template: str | None,  # the model's chat template, which decides "auto"
) -> MessageFormat:
    """Returns the formats of a model."""
    source = template or ""
    return MessageFormat(
        tools=_chosen(tool_call_parser, tool_parsers.FORMATS, tool_parsers.format_of(source)),
        reasoning=_chosen(reasoning_parser, reasoning.FORMATS, reasoning.format_of(source)),
    )


def _chosen(name: str, known: Mapping[str, T], fitting: T | None) -> T | None:
    if name == "auto":
        return fitting
    return None if name == "none" else known[name]
