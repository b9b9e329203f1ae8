"""Where a model's thinking begins and ends, for each way of marking it.

The prompt says more than the model's name: a template that opens or closes the thinking itself
leaves its mark at the prompt's end. Host only: imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxserve.text.source import Content, Parse, Reasoning, Source

State = Literal["open", "closed", "unknown"]
_CALL_OPENINGS = ("{", "<function=")  # what follows the mark of a real call
_MAX_OPENING = max(map(len, _CALL_OPENINGS))


@dataclass(frozen=True, kw_only=True)
class ReasoningFormat:
    """How a family marks its thinking."""

    name: str
    starts: tuple[str, ...] = ("<think>",)
    ends: tuple[str, ...] = ("</think>",)
    label: str = ""  # what follows the start and is no part of the thinking
    is_open_at_start: bool = False  # thinking begins without a mark, in the answer or the prompt

    @property
    def marks(self) -> tuple[str, ...]:
        """What must be visible, special tokens or not."""
        return self.starts + self.ends


DEEPSEEK_R1 = ReasoningFormat(name="deepseek_r1", is_open_at_start=True)
DEEPSEEK_V3 = ReasoningFormat(name="deepseek_v3")
QWEN_3 = ReasoningFormat(name="qwen3")
GLM_45 = ReasoningFormat(name="glm45")
GRANITE = ReasoningFormat(
    name="granite",
    starts=("Here is my thought process:", "Here's my thought process:"),
    ends=("Here is my response:", "Here's my response:"),
)
GEMMA_4 = ReasoningFormat(
    name="gemma4", starts=("<|channel>",), ends=("<channel|>",), label="thought\n"
)
HARMONY = ReasoningFormat(name="openai_gptoss", starts=(), ends=())  # has a parser of its own

FORMATS = {
    format.name: format
    for format in (DEEPSEEK_R1, DEEPSEEK_V3, QWEN_3, GLM_45, GRANITE, GEMMA_4, HARMONY)
}


def format_of(template: str) -> ReasoningFormat | None:
    """Returns the format whose marks a chat template holds, if it is a known one."""
    if "<|channel|>" in template:
        return HARMONY
    if "<|channel>" in template:
        return GEMMA_4
    if any(mark in template for mark in GRANITE.starts):
        return GRANITE
    if "<think>" not in template and "</think>" not in template:
        return None
    if "<｜Assistant｜>" in template:
        return DEEPSEEK_V3 if "thinking" in template else DEEPSEEK_R1
    return GLM_45 if "[gMASK]" in template else QWEN_3


def state_after(
    format: ReasoningFormat,
    prompt: str,
    prefill: str | None = None,  # the message that the answer continues
) -> State:
    """Returns whether the thinking is under way, over, or not begun when the answer begins."""
    tail = prompt.rstrip() if prefill is None else prefill
    last_start = max(tail.rfind(mark) for mark in format.starts)
    last_end = max(tail.rfind(mark) for mark in format.ends)
    if prefill is None:
        # Marks elsewhere in a prompt are other messages' or a user's own words.
        last_start = last_start if tail.endswith((*format.starts, _labelled(format))) else -1
        last_end = last_end if tail.endswith(format.ends) else -1
    if last_start > last_end:
        return "open"
    return "closed" if last_end >= 0 or prefill else "unknown"


def _labelled(format: ReasoningFormat) -> str:
    return (format.starts[0] + format.label).rstrip()


def thinking(
    source: Source,
    format: ReasoningFormat,
    state: State,
    call_start: str | None = None,  # the mark of a tool call, which ends a thinking left open
) -> Parse[None]:
    """Yields the reasoning, up to where the rest of the message begins."""
    if state == "closed":
        return
    source.record()
    yield from source.space()
    is_marked = yield from _takes_any(source, format.starts)
    space = source.recorded()
    if not is_marked and not format.is_open_at_start and state != "open":
        yield Content(space)
        return
    if not is_marked:
        yield Reasoning(space)
    if format.label:
        yield from source.takes(format.label)
    ends = format.ends if call_start is None else (*format.ends, call_start)
    while (mark := (yield from source.until(ends, Reasoning))) == call_start:
        space = yield from source.space()
        ahead = yield from source.peek(_MAX_OPENING)
        if ahead.startswith(_CALL_OPENINGS):
            source.put_back(mark + space)
            return
        yield Reasoning(mark + space)  # the model only thinks of the mark


def _takes_any(source: Source, marks: tuple[str, ...]) -> Parse[bool]:
    for mark in marks:
        if (yield from source.takes(mark)):
            return True
    return False
