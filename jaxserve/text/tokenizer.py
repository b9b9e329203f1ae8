"""Text to token ids and back, over the `tokenizers` library.

Host only: imports no jax and no transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import processors

from jaxserve.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from jaxserve.models.checkpoint import TokenizerFiles

# A Unicode noncharacter, which no text may interchange: it breaks up special tokens that a client
# typed, and is taken out again after encoding.
SENTINEL = "\ufdd0"

_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Pieces(dict[int, bytes]):
    """The exact bytes of each token, filled on first use; tokens outside the vocabulary are b""."""

    def __init__(self, read: Callable[[int], bytes | None]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, token: int) -> bytes:
        piece = self._read(token)
        if piece is None:
            return b""  # not stored: the dict stays as small as the vocabulary
        self[token] = piece
        return piece


class Tokenizer:
    """Encodes prompts and decodes tokens as `transformers` does. Any thread may use it.

    `pieces` and `visible_pieces` (special tokens are b"") give bytes whose concatenation is the
    text; both are None for the rare decoder that looks at neighbours (WordPiece and the like).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str | None] | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        named = {name: (special_tokens or {}).get(name) for name in _NAMED}
        self.special_tokens = {name: text for name, text in named.items() if text}
        self.bos_token, self.eos_token = named["bos_token"], named["eos_token"]
        self.pad_token, self.unk_token = named["pad_token"], named["unk_token"]
        self.chat_template = chat_template
        _mark_special(backend, self.special_tokens.values())
        self.bos_id, self.eos_id = self._id_of(self.bos_token), self._id_of(self.eos_token)
        self.pad_id, self.unk_id = self._id_of(self.pad_token), self._id_of(self.unk_token)
        if add_bos_token is not None or add_eos_token is not None or not backend.post_processor:
            backend.post_processor = _frame(
                (self.bos_token, self.bos_id) if add_bos_token else (None, None),
                (self.eos_token, self.eos_id) if add_eos_token else (None, None),
            )
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self._special_text = _any_of(entry.content for entry in added.values() if entry.special)
        spell, self.strips_first_space = _spelling(backend)
        self.pieces: Mapping[int, bytes] | None = None
        self.visible_pieces: Mapping[int, bytes] | None = None
        self._showing: dict[tuple[str, ...], Mapping[int, bytes]] = {}
        if spell:
            self.pieces = Pieces(lambda token: _read_piece(backend, spell, token))
            self.visible_pieces = self.pieces_showing(())

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> Tokenizer:
        """Returns the tokenizer of a checkpoint; raises `ConfigError` if it cannot be read."""
        try:
            backend = tokenizers.Tokenizer.from_str(files.tokenizer_json)
        except Exception as error:  # the library raises Exception itself
            raise ConfigError(f"the tokenizer cannot be read: {error}") from error
        return cls(
            backend,
            special_tokens={name: getattr(files, name) for name in _NAMED},
            add_bos_token=files.add_bos_token,
            add_eos_token=files.add_eos_token,
            chat_template=files.chat_template,
        )

    def pieces_showing(
        self,
        special: tuple[str, ...],  # few different ones: each is kept
    ) -> Mapping[int, bytes] | None:
        """Returns the bytes of each token, b"" for special tokens other than these."""
        pieces = self.pieces
        if pieces is None:
            return None
        if special not in self._showing:
            hidden = self.special_ids - {self.token_of(text) for text in special}
            self._showing[special] = Pieces(
                lambda token: b"" if token in hidden else pieces[token] or None
            )
        return self._showing[special]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of `text`; BOS (or EOS) is added where the model expects it."""
        return self._encode(text, add_special_tokens).ids

    def guard(self, value: Any) -> Any:
        """Returns `value` with special tokens inside its strings broken up by `SENTINEL`.

        Strings are looked at as if they stood in a row, so that a template which joins two of
        them cannot put a special token together. The result is `value` itself if there is none.
        """
        strings: list[str] = []
        _map_strings(value, strings.append)
        row = "".join(strings)
        if SENTINEL not in row and not self._special_text.search(row):
            return value
        strings = [text.replace(SENTINEL, "") for text in strings]
        breaks = self._breaks("".join(strings))
        replacements = iter(_split_row(strings, breaks))
        return _map_strings(value, lambda _: next(replacements))

    def _breaks(self, row: str) -> list[int]:
        """Returns where to break `row`: after the first letter of each special token, nested or
        overlapping ones included, which leaves none of them whole."""
        breaks, start = [], 0
        while match := self._special_text.search(row, start):
            start = match.start() + 1
            breaks.append(start)
        return breaks

    def encode_rendered(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Returns the tokens of a rendered chat template whose inputs went through `guard`.

        Special tokens that the template wrote are special; those that `guard` broke up are plain
        text. Without any, the tokens are those of the whole string, as in `transformers`.
        """
        encoding = self._encode(text, add_special_tokens)
        if SENTINEL not in text:
            return encoding.ids
        return [
            token
            for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
            if start == stop or text[start:stop].strip(SENTINEL)
        ]

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        pieces = self.visible_pieces if skip_special_tokens else self.pieces
        if pieces is None:
            known = [token for token in tokens if 0 <= token < 2**32]
            return self._backend.decode(known, skip_special_tokens=skip_special_tokens)
        text = b"".join([pieces[token] for token in tokens]).decode("utf-8", "replace")
        return text[1:] if self.strips_first_space and text.startswith(" ") else text

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that `token` adds to a text, special tokens included."""
        if self.pieces is not None:
            return self.pieces[token]
        return self.decode([token], skip_special_tokens=False).encode()

    def token_text(self, token: int) -> str:
        """Returns `token` as text, special tokens included; part of a character is U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_of(self, text: str) -> int | None:
        """Returns the token whose vocabulary entry is exactly `text`, if there is one."""
        return self._backend.token_to_id(text)

    def vocabulary(self) -> dict[str, int]:
        """Returns every vocabulary entry with its token, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:  # a lone surrogate, which the library does not take for text
            raise RequestError("the text is not valid Unicode", param="prompt") from error

    def _id_of(self, text: str | None) -> int | None:
        return None if text is None else self._backend.token_to_id(text)


def _mark_special(backend: tokenizers.Tokenizer, names: Any) -> None:
    """Makes BOS, EOS and the like special where the file forgot to; never grows the vocabulary."""
    special = {
        entry.content for entry in backend.get_added_tokens_decoder().values() if entry.special
    }
    forgotten = [
        tokenizers.AddedToken(text, special=True, normalized=False)
        for text in dict.fromkeys(names)
        if text not in special and backend.token_to_id(text) is not None
    ]
    if forgotten:
        backend.add_special_tokens(forgotten)


def _frame(bos: tuple[str | None, int | None], eos: tuple[str | None, int | None]) -> Any:
    """Returns the post-processor that puts BOS before and EOS after a text, where given."""
    front = [(text, token) for text, token in (bos,) if text and token is not None]
    back = [(text, token) for text, token in (eos,) if text and token is not None]
    parts = [f"{text}:0" for text, _ in front] + ["$A:0"] + [f"{text}:0" for text, _ in back]
    return processors.TemplateProcessing(
        single=parts,
        pair=[*parts, "$B:1"],
        special_tokens=list(dict.fromkeys(front + back)),
    )


def _any_of(texts: Any) -> re.Pattern[str]:
    """Returns a pattern that finds any of `texts`; one of a single letter cannot be broken up."""
    found = sorted({text for text in texts if len(text) > 1})
    return re.compile("|".join(map(re.escape, found)) or r"(?!)")


def _split_row(strings: Sequence[str], breaks: Sequence[int]) -> list[str]:
    """Returns `strings` with `SENTINEL` before each of the positions `breaks` of their row."""
    result, first, index = [], 0, 0
    for text in strings:
        parts, cut = [], 0
        while index < len(breaks) and breaks[index] < first + len(text):
            parts.append(text[cut : breaks[index] - first])
            cut = breaks[index] - first
            index += 1
        result.append(SENTINEL.join([*parts, text[cut:]]))
        first += len(text)
    return result


def _map_strings(value: Any, change: Callable[[str], Any]) -> Any:
    """Returns `value` with `change` applied to the strings in its lists and dict values."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _byte_of_letter() -> dict[str, int]:
    """Returns GPT-2's table: each byte is written as one printable letter.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF_LETTER = _byte_of_letter()


def _spell_byte_level(text: str) -> bytes:
    """Returns the bytes of a byte-level entry; one that is not such a spelling is itself."""
    try:
        return bytes([BYTE_OF_LETTER[letter] for letter in text])
    except KeyError:
        return text.encode()


def _spell_sentencepiece(text: str) -> bytes:
    """Returns the bytes of a SentencePiece entry: a byte token, or text with marked spaces."""
    if match := _BYTE_TOKEN.fullmatch(text):
        return bytes([int(match[1], 16)])
    return text.replace(_SPACE_MARK, " ").encode()


def _spelling(backend: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes] | None, bool]:
    """Returns how an entry spells its bytes, and if a text's first space is dropped.

    None where the text of a token depends on its neighbours.
    """
    decoder = _state(backend.decoder)
    if decoder["type"] == "ByteLevel":
        return _spell_byte_level, False
    steps = decoder.get("decoders", [])
    replace = {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    common = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if steps in (common, [*common, strip]):
        return _spell_sentencepiece, strip in steps
    return None, False


def _state(decoder: Any) -> dict[str, Any]:
    """Returns a decoder as its JSON, without writing out the whole vocabulary beside it."""
    return json.loads(decoder.__getstate__()) if decoder else {"type": None}


def _read_piece(
    backend: tokenizers.Tokenizer, spell: Callable[[str], bytes], token: int
) -> bytes | None:
    text = backend.id_to_token(token) if 0 <= token < 2**32 else None
    return None if text is None else spell(text)
