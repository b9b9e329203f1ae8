"""Converts the tokenizer in GGUF metadata to the JSON of the `tokenizers` library.

The ids follow llama.cpp, the file format's own implementation. Host only: imports no jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import TokenizerFiles
from jaxserve.models.checkpoint.files import open_binary
from jaxserve.models.checkpoint.gguf_header import read_header

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# As Mistral publishes it; llama.cpp leaves out the combining marks.
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How text is cut before BPE. Each pattern cuts the pieces that the one before left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken whole, without merging
    add_bos: bool = False  # where the file does not say


_SINGLE_DIGITS = PreTokenizer(patterns=(r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizer(patterns=(_GPT2,))
_LLAMA3_RULES = PreTokenizer(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)

# tokenizer.ggml.pre -> rules; the table is llama.cpp's (llama-vocab.cpp).
PRE_TOKENIZERS = {
    "default": PreTokenizer(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    ),
    "gpt-2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "mpt": _PLAIN_GPT2,
    "olmo": _PLAIN_GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "llama-bpe": _LLAMA3_RULES,
    "dbrx": PreTokenizer(patterns=(_LLAMA3,)),
    "smaug-bpe": PreTokenizer(patterns=(_LLAMA3,)),
    "qwen2": PreTokenizer(patterns=(_QWEN2,)),
    "deepseek-r1-qwen": PreTokenizer(patterns=(_QWEN2,)),
    "tekken": PreTokenizer(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
}


def gguf_tokenizer_files(path: Path) -> TokenizerFiles:
    """Returns the tokenizer of a GGUF file, converted. Raises `WeightError`."""
    file, size = open_binary(path)
    with file:
        metadata = read_header(file, size, path).metadata
    return convert_tokenizer(metadata, path)


def convert_tokenizer(
    metadata: dict[str, Any],  # of the GGUF header
    path: Path,  # for errors
) -> TokenizerFiles:
    """Returns the tokenizer that GGUF metadata describe. Raises `WeightError`."""
    source = _Source(metadata, path)
    kind = source.text("model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(source)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(source), True
    else:
        raise source.error(f"tokenizer model {kind!r} is not supported (gpt2 and llama are)")
    _add_tokens(tokenizer, source)
    add_bos = source.flag("add_bos_token", add_bos)
    add_eos = source.flag("add_eos_token", False)
    bos, eos = source.token("bos"), source.token("eos")
    _add_post_processor(tokenizer, source, bos if add_bos else None, eos if add_eos else None)
    template = metadata.get("tokenizer.chat_template")
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    return TokenizerFiles(
        tokenizer_json=tokenizer.to_str(),
        bos_token=bos,
        eos_token=eos,
        pad_token=source.token("padding"),
        unk_token=source.token("unknown"),
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        chat_template=template if isinstance(template, str) else None,
        model_max_length=length if type(length) is int else None,
    )


class _Source:
    # Typed access to the tokenizer.ggml.* metadata.

    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path
        self.tokens: list[str] = self._texts("tokens")
        types = metadata.get("tokenizer.ggml.token_type")
        self.types: list[int] = (
            [NORMAL] * len(self.tokens) if types is None else self._numbers("token_type")
        )
        self.vocab = {token: index for index, token in enumerate(self.tokens)}
        if len(self.vocab) != len(self.tokens):
            raise self.error("tokenizer.ggml.tokens holds the same token twice")

    def error(self, what: str) -> WeightError:
        return WeightError(f"{self.path}: {what}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, str):
            raise self.error(f"metadata 'tokenizer.ggml.{key}' is missing or not a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, bool):
            raise self.error(f"metadata 'tokenizer.ggml.{key}' is not a boolean")
        return value

    def token(self, key: str) -> str | None:
        index = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self.tokens):
            raise self.error(f"metadata 'tokenizer.ggml.{key}_token_id' {index!r} is no token")
        return self.tokens[index]

    def merges(self) -> list[tuple[str, str]]:
        pairs = []
        for merge in self._texts("merges"):
            # A space inside a piece is spelled otherwise, except a leading one.
            cut = merge.find(" ", 1)
            if cut < 0:
                raise self.error(f"tokenizer.ggml.merges: {merge!r} is not a pair")
            pairs.append((merge[:cut], merge[cut + 1 :]))
        return pairs

    def scores(self) -> list[float]:
        return self._numbers("scores")

    def _texts(self, key: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, list):
            raise self.error(f"metadata 'tokenizer.ggml.{key}' is missing or not a list of texts")
        return value

    def _numbers(self, key: str) -> list[Any]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise self.error(f"metadata 'tokenizer.ggml.{key}' needs one number for each token")
        return value.tolist()


def _byte_level(source: _Source) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = source.text("pre", "default")
    rules = PRE_TOKENIZERS.get(name)
    if rules is None:
        raise source.error(
            f"tokenizer.ggml.pre {name!r} is not supported (known: {', '.join(PRE_TOKENIZERS)})"
        )
    try:
        model = models.BPE(
            vocab=source.vocab, merges=source.merges(), ignore_merges=rules.ignore_merges
        )
    # The library raises plain Exception, for example for a merge that makes no token.
    except Exception as error:
        raise source.error(f"tokenizer.ggml.merges cannot be used ({error})") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns),
            pre_tokenizers.ByteLevel(
                add_prefix_space=source.flag("add_space_prefix", False), use_regex=False
            ),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rules.add_bos


def _sentencepiece(source: _Source) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = source.token("unknown") or "<unk>"
    model = models.BPE(
        vocab=source.vocab,
        merges=_merges_from_scores(source),
        unk_token=unknown if unknown in source.vocab else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = source.flag("add_space_prefix", True)
    # Prepended to every stretch between special tokens, as sentencepiece and llama.cpp do.
    spaces = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(source: _Source) -> list[tuple[str, str]]:
    # Sentencepiece joins whichever neighbours make the token of the highest score, so every way
    # to cut a token in two known pieces is a merge, ranked by the token's score.
    pieces = {
        token: index
        for index, (token, kind) in enumerate(zip(source.tokens, source.types, strict=True))
        if kind in (NORMAL, USER_DEFINED, UNUSED)
    }
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for token, score in zip(source.tokens, source.scores(), strict=True):
        if token not in pieces:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                order = (-score, -cut, pieces[left], pieces[right])
                ranked.append((*order, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_tokens(tokenizer: Any, source: _Source) -> None:
    from tokenizers import AddedToken

    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(source.tokens, source.types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]
    tokenizer.add_tokens(added)


def _add_post_processor(tokenizer: Any, source: _Source, bos: str | None, eos: str | None) -> None:
    from tokenizers import processors

    if bos is None and eos is None:
        return

    def with_ends(parts: Sequence[str], kind: int) -> list[str]:
        return [f"{part}:{kind}" for part in parts if part]

    single = with_ends((bos or "", "$A", eos or ""), 0)
    second = with_ends((bos or "", "$B", eos or ""), 1)
    ends = [(token, source.vocab[token]) for token in (bos, eos) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *second], special_tokens=list(dict.fromkeys(ends))
    )
