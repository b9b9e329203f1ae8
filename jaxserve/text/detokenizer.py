"""Turns the tokens of a running sample into text, piece by piece, and finds stop strings.

Host only: imports no jax.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from jaxserve.text.tokenizer import Tokenizer

# A character has at most 4 bytes; what is still broken after this many tokens stays broken.
MAX_HELD_TOKENS = 8
_CONTEXT_TOKENS = 5  # of the prompt, for decoders that look at neighbours


class TextDelta(NamedTuple):
    """What became certain by some tokens.

    A tuple because one is made for every token: a frozen dataclass takes three times as long.
    """

    text: str = ""
    stop: str | None = None  # the stop string that ended the sample
    num_tokens: int = 0  # tokens used; fewer than pushed if a stop string ended it on the way
    offsets: tuple[int, ...] = ()  # where each used token starts, in characters of the whole text


class _Decoder(Protocol):
    def decode(self, token: int) -> str: ...
    def flush(self) -> str: ...


class TextStream:
    """The text of one sample. One thread at a time may use it.

    Never emits part of a character; U+FFFD appears only for bytes that are not UTF-8. The deltas
    of a stream without a prompt, joined, are `Tokenizer.decode` of its tokens. Text that could
    begin a stop string is held back until that is decided. A stop string counts as soon as it is
    complete, so the result does not depend on how tokens were grouped into pushes. `num_chars`
    counts the decoded characters, those held back included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_tokens: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        shown_special_tokens: tuple[str, ...] = (),
        spaces_between_special_tokens: bool = True,
    ) -> None:
        pieces = tokenizer.pieces
        if skip_special_tokens:
            pieces = tokenizer.pieces_showing(shown_special_tokens)
            # Decoders that look at neighbours show all special tokens or none.
            skip_special_tokens = not shown_special_tokens
        self._decoder: _Decoder
        if pieces is not None:
            # After a prompt with text, a leading space is part of the answer.
            is_start = not any(pieces[token] for token in reversed(prompt_tokens))
            self._decoder = _ByteDecoder(pieces, tokenizer.strips_first_space and is_start)
        else:
            self._decoder = _ContextDecoder(
                tokenizer,
                prompt_tokens[-_CONTEXT_TOKENS:],
                skip_special_tokens,
                spaces_between_special_tokens or skip_special_tokens,
            )
        self._stop = _StopSearch(stop, include_stop) if stop else None
        self._num_protected = min_tokens
        self.num_chars = 0

    def push(self, tokens: Sequence[int], final: bool = False) -> TextDelta:
        """Returns the text that `tokens` make certain; with `final`, all that was held back.

        After a delta with a `stop`, or a final one, the stream is used up.
        """
        decode, search = self._decoder.decode, self._stop
        parts, offsets = [], []
        for count, token in enumerate(tokens, 1):
            offsets.append(self.num_chars)
            text = decode(token)
            self.num_chars += len(text)
            if search is None:
                parts.append(text)
                continue
            is_protected = self._num_protected > 0
            self._num_protected -= is_protected
            visible, stop = search.push(text, is_protected)
            parts.append(visible)
            if stop is not None:
                return TextDelta(
                    text="".join(parts), stop=stop, num_tokens=count, offsets=tuple(offsets)
                )
        stop = None
        if final:
            text = self._decoder.flush()
            if search is not None:
                text, stop = search.push(text, self._num_protected > 0, final=True)
            parts.append(text)
        return TextDelta(
            text="".join(parts), stop=stop, num_tokens=len(tokens), offsets=tuple(offsets)
        )


class _ByteDecoder:
    """For tokenizers whose tokens are bytes: the text is their concatenation."""

    def __init__(self, pieces: Mapping[int, bytes], strip_space: bool) -> None:
        self._pieces = pieces
        self._strip_space = strip_space
        # Holds back an unfinished character, at most 3 bytes.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def decode(self, token: int) -> str:
        return self._strip(self._utf8.decode(self._pieces[token]))

    def flush(self) -> str:
        return self._strip(self._utf8.decode(b"", True))

    def _strip(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text[1:] if text[0] == " " else text
        return text


class _ContextDecoder:
    """For decoders that look at neighbours: decodes a window with and without the new tokens.

    The window [start, read) is text already given out; [read, len) is held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: Sequence[int],
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._window = list(context)
        self._read = len(self._window)
        self._after_special = False

    def decode(self, token: int) -> str:
        is_special = token in self._tokenizer.special_ids
        is_joined = is_special and self._after_special and not self._spaces
        self._after_special = is_special
        self._window.append(token)
        text = self._new_text()
        is_broken = text.endswith("\ufffd")
        # Tokens without text stay in the window: what follows needs their neighbours.
        if not text or (is_broken and len(self._window) - self._read < MAX_HELD_TOKENS):
            return ""
        self._advance()
        return text.lstrip(" ") if is_joined else text

    def flush(self) -> str:
        text = self._new_text()
        self._advance()
        return text

    def _new_text(self) -> str:
        before = self._text(self._window[: self._read])
        return self._text(self._window)[len(before) :]

    def _advance(self) -> None:
        self._window = self._window[self._read :]
        self._read = len(self._window)

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


class _StopSearch:
    """Finds the stop string that is complete first, and holds back what could become one."""

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._stop = tuple(dict.fromkeys(stop))
        self._include = include
        self._firsts = frozenset(text[0] for text in self._stop)
        self._longest = max(map(len, self._stop))
        self._held = ""

    def push(
        self,
        text: str,
        is_protected: bool,  # a stop string may not end in this text
        final: bool = False,
    ) -> tuple[str, str | None]:
        """Returns the text that can be shown, and the stop string if one is complete."""
        if not text and not final:
            return "", None
        num_old = len(self._held)
        held = self._held + text
        if not is_protected and (match := self._first_match(held, num_old)) is not None:
            start, stop = match
            return held[: start + len(stop) if self._include else start], stop
        cut = len(held) if final else self._certain(held)
        self._held = held[cut:]
        return held[:cut], None

    def _first_match(self, held: str, num_old: int) -> tuple[int, str] | None:
        """Returns the match that ends first, the longest of those, and past `num_old`."""
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = held.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start, stop) < best):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _certain(self, held: str) -> int:
        """Returns how many characters cannot be part of a stop string any more."""
        if self._firsts.isdisjoint(held):
            return len(held)
        for start in range(max(0, len(held) - self._longest + 1), len(held)):
            if held[start] in self._firsts:
                tail = held[start:]
                if any(stop.startswith(tail) for stop in self._stop):
                    return start
        return len(held)
