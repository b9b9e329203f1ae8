"""Two small tokenizers of the kinds that models use, trained on a few lines."""

from __future__ import annotations

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "hello world, how are you? the cat sat on the mat. it's fine\n\n  x = 1 <tool> [INST]",
    "日本語のテキスト 😀 👩‍👩‍👧 naïve café Straße Привет мир",
] * 20
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>", "</s>"]


@functools.cache
def _byte_level_json() -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=CHAT_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens(["<think>"])
    return backend.to_str()


@functools.cache
def _sentencepiece_json() -> str:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", *CHAT_TOKENS, *byte_tokens],
        limit_alphabet=60,  # leaves rare letters to the byte tokens
        show_progress=False,
    )
    # Words apart, as SentencePiece trains.
    backend.train_from_iterator([word for line in LINES for word in line.split()], trainer)
    content = json.loads(backend.to_str())
    # In real files byte tokens are ordinary entries.
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] not in byte_tokens
    ]
    return json.dumps(content)


def byte_level() -> tokenizers.Tokenizer:
    """Returns a byte-level BPE tokenizer, as GPT-2's and Llama 3's."""
    return tokenizers.Tokenizer.from_str(_byte_level_json())


def sentencepiece() -> tokenizers.Tokenizer:
    """Returns a BPE tokenizer with byte fallback, as Llama 2's and Mistral's."""
    return tokenizers.Tokenizer.from_str(_sentencepiece_json())
