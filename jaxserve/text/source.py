"""Text that is still arriving, and how parsers read it.

A parser is a generator: it yields the pieces of a message as they become certain, and None where
it needs more text. What it yields, joined, does not depend on how the text was cut, since every
way of reading here waits until the answer is certain. All of them together look at each character
a bounded number of times. Host only: imports no jax.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

_PART_CHARS = 1024


class Content(NamedTuple):
    """Text of the answer."""

    text: str


class Reasoning(NamedTuple):
    """Text of the thinking before the answer."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins; calls are numbered from 0."""

    number: int
    name: str


class Arguments(NamedTuple):
    """More of the JSON text of a call's arguments."""

    number: int
    text: str


Piece: TypeAlias = Content | Reasoning | CallStart | Arguments
Parse: TypeAlias = Generator[Piece | None, None, T]  # None waits for more text


class Malformed(Exception):
    """What looked like a tool call is none."""


@dataclass(frozen=True)
class CallArguments:
    """Makes `Arguments` of one call from text."""

    number: int

    def __call__(self, text: str) -> Arguments:
        return Arguments(self.number, text)


class Source:
    """The text of one sample, consumed from the left. Belongs to one parser."""

    def __init__(self) -> None:
        self.num_read = 0  # characters consumed so far
        self._text = ""
        self._start = 0  # the unread text is _text[_start:]
        self._is_final = False
        self._record: list[str] | None = None

    def feed(self, text: str, *, final: bool) -> None:
        """Appends text; after a final one nothing more comes."""
        self._text = self._text[self._start :] + text
        self._start = 0
        self._is_final = final

    def record(self, text: str = "") -> None:
        """Remembers what is consumed from now on, with `text` before it."""
        self._record = [text]

    def recorded(self) -> str:
        """Returns what has been remembered, and ends the record."""
        parts, self._record = self._record or (), None
        return "".join(parts)

    def take_now(self, count: int) -> str:
        """Consumes `count` characters that are there, as `peek` or `ahead` has shown."""
        text = self._text[self._start : self._start + count]
        assert len(text) == count, f"{count=} of {len(text)}"
        self._start += count
        self.num_read += count
        if self._record is not None:
            self._record.append(text)
        return text

    def put_back(self, text: str) -> None:
        """Makes `text`, which has been consumed last, unread again; ends the record."""
        self._record = None
        self._text = text + self._text[self._start :]
        self._start = 0
        self.num_read -= len(text)

    def peek(self, count: int = 1) -> Parse[str]:
        """Returns the next characters, fewer than `count` only at the end of the text."""
        while len(self._text) - self._start < count and not self._is_final:
            yield None
        return self._text[self._start : self._start + count]

    def ahead(self) -> Parse[str]:
        """Returns all the unread text, of which there is some unless the text has ended."""
        yield from self.peek()
        return self._text[self._start :]

    def takes(self, literal: str) -> Parse[bool]:
        """Consumes `literal` if it comes next; says whether it did."""
        for count in range(1, len(literal) + 1):  # no longer than it takes to know
            if (yield from self.peek(count)) != literal[:count]:
                return False
        self.take_now(len(literal))
        return True

    def expect(self, literal: str) -> Parse[None]:
        """Consumes `literal`; raises `Malformed` if something else comes next."""
        if not (yield from self.takes(literal)):
            raise Malformed

    def take_while(self, is_wanted: Callable[[str], bool], limit: int | None = None) -> Parse[str]:
        """Consumes characters as long as they are wanted; raises `Malformed` above the limit."""
        parts, room = [], limit
        while text := (yield from self.ahead()):
            size = next((i for i, char in enumerate(text) if not is_wanted(char)), len(text))
            room = self._spend(size, room)
            parts.append(self.take_now(size))
            if size < len(text):
                break
        return "".join(parts)

    def space(self) -> Parse[str]:
        """Consumes white space."""
        return (yield from self.take_while(str.isspace))

    def until(
        self, markers: tuple[str, ...], make: Callable[[str], Piece] | None = None
    ) -> Parse[str]:
        """Yields what stands before the first marker, as `make` wants it (None drops it).

        Returns the marker, consumed; "" if the text ends before one. No marker may be complete
        while another one that began before it is not.
        """
        while True:
            text = self._text[self._start :]
            place, marker = _first_of(markers, text)
            if not marker and not self._is_final:
                place = len(text) - _overlap(text, markers)
            if place:
                before = self.take_now(place)
                if make is not None:
                    yield make(before)
            if marker or self._is_final:
                return self.take_now(len(marker))
            yield None

    def take_until(self, marker: str, limit: int | None = None) -> Parse[str]:
        """Consumes the marker and returns what stands before it.

        Raises `Malformed` if there is none, or more than `limit` characters before it.
        """
        parts, room = [], limit
        while True:
            text = self._text[self._start :]
            place = text.find(marker)
            size = place if place >= 0 else len(text) - _overlap(text, (marker,))
            room = self._spend(size, room)
            parts.append(self.take_now(size))
            if place >= 0:
                self.take_now(len(marker))
                return "".join(parts)
            if self._is_final:
                self.take_now(len(text) - size)
                raise Malformed
            yield None

    def _spend(self, size: int, room: int | None) -> int | None:
        """Returns the room left after `size` characters.

        Without enough of it, exactly that much is consumed and `Malformed` is raised.
        """
        if room is None:
            return None
        if size > room:
            self.take_now(room)
            raise Malformed
        return room - size

    def rest(self, make: Callable[[str], Piece]) -> Parse[None]:
        """Yields everything that is still to come."""
        while text := (yield from self.ahead()):
            yield make(self.take_now(len(text)))


def parts_of(text: str, *, final: bool) -> Iterator[tuple[str, bool]]:
    """Yields a text in parts to feed, each with whether it is final.

    A source looks at all its unread text again and again, so it is to have little of it.
    """
    for start in range(0, max(len(text), 1), _PART_CHARS):
        end = start + _PART_CHARS
        yield text[start:end], final and end >= len(text)


def read_whole(parser: Callable[[Source], Parse[T]], text: str) -> T:
    """Returns what a parser returns on a whole text, dropping its pieces.

    Raises `Malformed` where the parser does, or if it leaves text over.
    """
    source = Source()
    parse = parser(source)
    try:
        for part, is_final in parts_of(text, final=True):
            source.feed(part, final=is_final)
            while next(parse) is not None:
                pass
    except StopIteration as end:
        if source.num_read < len(text):
            raise Malformed from None
        return end.value
    raise AssertionError("a parser waits for text that will not come")


def _first_of(markers: tuple[str, ...], text: str) -> tuple[int, str]:
    """Returns where the first marker in `text` begins and which it is; (len(text), "") if none."""
    place, found = len(text), ""
    for marker in markers:
        start = text.find(marker, 0, place + len(marker) - 1)
        if start >= 0:
            place, found = start, marker
    return place, found


def _overlap(text: str, markers: tuple[str, ...]) -> int:
    """Returns how many of the last characters of `text` could begin a marker."""
    longest = 0
    for marker in markers:
        start = text.find(marker[0], max(0, len(text) - len(marker) + 1))
        while start >= 0 and not marker.startswith(text[start:]):
            start = text.find(marker[0], start + 1)
        if start >= 0:
            longest = max(longest, len(text) - start)
    return longest
