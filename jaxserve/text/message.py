"""Turns the text of a sample, piece by piece, into a message: reasoning, content, tool calls.

Streams and whole replies use the same reader: a whole text is a stream of one piece.
Host only: imports no jax.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxserve.text.source import (
    Arguments,
    CallStart,
    Content,
    Parse,
    Piece,
    Reasoning,
    Source,
    parts_of,
)


class CallDelta(NamedTuple):
    """What is new of one tool call. The first delta of a call has its id and name."""

    number: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Said(NamedTuple):
    """What is new of a message."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    @property
    def rest(self) -> tuple[CallDelta, ...]:
        """The rest of a call that had begun before: it comes first."""
        return tuple(call for call in self.calls if call.name is None)

    @property
    def new_calls(self) -> tuple[CallDelta, ...]:
        """Calls that begin here, behind reasoning and content."""
        return tuple(call for call in self.calls if call.name is not None)


class MessageReader:
    """Reads one sample. One thread at a time may use it.

    White space next to reasoning and tool calls is dropped, as it belongs to the format. Calls
    from `max_calls` on are dropped.
    """

    def __init__(
        self,
        parse: Callable[[Source], Parse[None]],
        *,
        new_id: Callable[[], str],
        max_calls: int | None = None,
        has_reasoning: bool = True,  # False drops it
    ) -> None:
        self.num_calls = 0
        self._source = Source()
        self._pieces = parse(self._source)
        self._new_id = new_id
        self._max_calls = max_calls
        self._has_reasoning = has_reasoning
        self._content = _Content()
        self._reasoning = _Reasoning()
        self._offsets: list[int] = []  # where each token starts
        self._spans: list[tuple[int, int]] = []  # the characters of the reasoning
        self._content_spans: list[tuple[int, int]] = []

    def push(self, text: str, offsets: Sequence[int] = (), *, final: bool = False) -> Said:
        """Returns what `text` makes certain; with `final`, all that was held back.

        `offsets` says where its tokens start, in characters of the whole text.
        """
        self._offsets.extend(offsets)
        content: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, tuple[CallDelta, list[str]]] = {}  # with its arguments' pieces
        for piece in self._read(text, final):
            match piece:
                case Content(said):
                    self._note(self._content_spans, len(said))
                    content.append(self._content.push(said))
                case Reasoning(said):
                    self._note(self._spans, len(said))
                    reasoning.append(self._reasoning.push(said))
                    self._content.follow()
                case _:
                    self._add_call(piece, calls)
                    self._content.follow()
        if final:
            content.append(self._content.flush())
        return Said(
            content="".join(content),
            reasoning="".join(reasoning) if self._has_reasoning else "",
            calls=tuple(
                delta._replace(arguments="".join(parts)) for delta, parts in calls.values()
            ),
        )

    def _read(self, text: str, final: bool) -> Iterator[Piece]:
        """Yields the pieces that `text` makes certain."""
        for part, is_final in parts_of(text, final=final):
            self._source.feed(part, final=is_final)
            for piece in self._pieces:
                if piece is None:
                    assert not is_final, "a parser waits for text that will not come"
                    break
                yield piece

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens that start inside the reasoning; its marks do not count."""
        starts = self._offsets
        return sum(
            bisect_left(starts, end) - bisect_left(starts, start) for start, end in self._spans
        )

    @property
    def num_read(self) -> int:
        """Characters of the text whose meaning is certain."""
        return self._source.num_read

    def is_content(self, offset: int) -> bool:
        """True if the character at `offset`, which has been read, is content."""
        index = bisect_right(self._content_spans, offset, key=lambda span: span[0]) - 1
        return index >= 0 and offset < self._content_spans[index][1]

    def _note(self, spans: list[tuple[int, int]], size: int) -> None:
        end = self._source.num_read
        start = end - size
        if spans and spans[-1][1] == start:
            start, _ = spans.pop()
        spans.append((start, end))

    def _add_call(
        self, piece: CallStart | Arguments, calls: dict[int, tuple[CallDelta, list[str]]]
    ) -> None:
        number = piece.number
        if self._max_calls is not None and number >= self._max_calls:
            return
        if isinstance(piece, CallStart):
            self.num_calls += 1
            calls[number] = (CallDelta(number, id=self._new_id(), name=piece.name), [])
            return
        if number not in calls:
            calls[number] = (CallDelta(number), [])
        calls[number][1].append(piece.text)


class _Content:
    """Holds white space back until it is known whether more content follows it."""

    def __init__(self) -> None:
        self._space: list[str] = []
        self._is_first = True  # nothing at all has been said
        self._is_inside = False  # the last thing said was content

    def push(self, text: str) -> str:
        if self._is_inside:
            return text
        body = text.lstrip()
        if self._is_first:
            self._space.append(text[: len(text) - len(body)])
        if not body:
            return ""
        self._is_inside, self._is_first = True, False
        return "".join(self._space) + body

    def follow(self) -> None:
        """Something other than content has been said."""
        self._is_inside = self._is_first = False
        self._space.clear()

    def flush(self) -> str:
        """Returns the white space of a message that is nothing else."""
        return "".join(self._space) if self._is_first else ""


class _Reasoning:
    """Drops white space around the reasoning."""

    def __init__(self) -> None:
        self._space: list[str] = []
        self._is_empty = True

    def push(self, text: str) -> str:
        body = text.rstrip()
        tail = text[len(body) :]
        if self._is_empty:
            body = body.lstrip()
        if not body:
            if not self._is_empty:
                self._space.append(tail)
            return ""
        before = "".join(self._space)
        self._space = [tail]
        self._is_empty = False
        return before + body
