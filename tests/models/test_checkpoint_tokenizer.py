"""Tokenizers converted from GGUF, against transformers' own conversion and fixed ids."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, pre_tokenizers

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint import resolve, tokenizer_files
from jaxserve.models.checkpoint.gguf_tokenizer import convert_tokenizer
from tests.checkpoints import CHAT_TEMPLATE, write_llama_folder, write_llama_gguf, write_spm_gguf

HARD_TEXTS = [
    "",
    "Hello, world!",
    "12345 67,890.12 ٣٤٥ ½ Ⅻ",
    "世界你好，今天天气123怎么样？",
    "こんにちは カタカナ",
    "🦙🦙 👨‍👩‍👧‍👦 e\u0301",
    "a" + " " * 70 + "b",
    "trailing   ",
    "a\r\nb\r\n\r\n\n  c\t\td",
    "don't WON'T I'LL we've",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x",
    "العربية עברית हिन्दी ไทย",
    "\x00\x01\x7f\u00a0\u3000\u2028\ufeff",
    "x" * 200,
]


def random_texts(count: int) -> list[str]:
    """Returns short texts out of characters on which pre-tokenizers differ."""
    rng = random.Random(0)
    alphabet = "ab Z0179 \n\t'sS.,$+^<>_é世あ🦙٣½\u00a0\u0301\r/|~"
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(count)]


def converted(path: Path) -> Any:
    """Returns the tokenizer of a GGUF file."""
    return Tokenizer.from_str(tokenizer_files(path).tokenizer_json)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF with a sentencepiece tokenizer."""
    return write_spm_gguf(tmp_path_factory.mktemp("spm") / "spm.gguf")


@pytest.mark.slow
def test_the_demo_tokenizer_gives_the_ids_of_transformers_conversion():
    path = resolve("demo")
    oracle = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers leaves out what `tokenizer.ggml.pre` = smollm says: digits stand alone.
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    ours = converted(path)
    for text in HARD_TEXTS + random_texts(500):
        tokens = ours.encode(text).ids
        assert tokens == oracle(text).input_ids, text
        assert ours.decode(tokens, skip_special_tokens=False) == text


def test_the_demo_tokenizer_states_its_special_tokens_and_template():
    files = tokenizer_files(resolve("demo"))
    assert (files.bos_token, files.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (files.pad_token, files.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert (files.add_bos_token, files.add_eos_token) == (False, False)
    assert files.model_max_length == 8192
    assert "You are a helpful AI assistant named SmolLM" in files.chat_template
    # Fixed ids, as SmolLM2's own tokenizer.json gives them: each digit is a token.
    tokens = converted(resolve("demo")).encode("The capital of France is 2024<|im_end|>").ids
    assert tokens == [504, 3575, 282, 4649, 314, 216, 34, 32, 34, 36, 2]


def test_a_byte_level_twin_gives_the_ids_of_its_folder(tmp_path):
    folder = write_llama_folder(tmp_path)
    twin = write_llama_gguf(tmp_path / "x.gguf", folder)
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = converted(twin)
    for text in HARD_TEXTS + random_texts(200):
        assert ours.encode(text).ids == original.encode(text).ids, text
    files, expected = tokenizer_files(twin), tokenizer_files(folder)
    assert (files.bos_token, files.eos_token) == (expected.bos_token, expected.eos_token)
    assert files.chat_template == expected.chat_template == CHAT_TEMPLATE


@pytest.mark.slow  # transformers' conversion needs torch
def test_a_sentencepiece_tokenizer_gives_the_ids_of_transformers_conversion(spm):
    oracle = transformers.AutoTokenizer.from_pretrained(spm.parent, gguf_file=spm.name)
    ours = converted(spm)
    # transformers adds no space before text that begins with one, or that follows a special
    # token; sentencepiece and llama.cpp do (next test), so those texts are left out here.
    texts = [text for text in HARD_TEXTS + random_texts(500) if not text.startswith(" ")]
    assert len(texts) > 400
    for text in texts:
        assert ours.encode(text).ids == oracle(text).input_ids, text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the", ["<s>", "▁the"]),
        (" the", ["<s>", "▁", "▁the"]),
        ("[INST]the", ["<s>", "[INST]", "▁the"]),
        ("the<tool>the", ["<s>", "▁the", "<tool>", "▁the"]),
        ("the</s>", ["<s>", "▁the", "</s>"]),
        ("\x01é", ["<s>", "▁", "<0x01>", "é"]),
        ("ß", ["<s>", "▁", "<0xC3>", "<0x9F>"]),
        ("", ["<s>"]),
    ],
)
def test_sentencepiece_puts_a_space_before_each_stretch_as_llama_cpp_does(spm, text, pieces):
    assert converted(spm).encode(text).tokens == pieces


def test_sentencepiece_text_survives_encoding_and_decoding(spm):
    ours = converted(spm)
    for text in HARD_TEXTS:
        assert ours.decode(ours.encode(text, add_special_tokens=False).ids) == text


def test_bos_eos_and_the_space_prefix_follow_the_file(tmp_path):
    path = tmp_path / "x.gguf"
    tokens = converted(write_spm_gguf(path, add_bos=False, add_eos=True)).encode("the").tokens
    assert tokens == ["▁the", "</s>"]
    tokens = converted(write_spm_gguf(path, space_prefix=False)).encode("the").tokens
    assert tokens[0] == "<s>" and "▁the" not in tokens
    pair = converted(write_spm_gguf(path, add_eos=True)).encode("the", "the")
    assert pair.tokens == ["<s>", "▁the", "</s>"] * 2


def test_control_tokens_are_special_and_user_defined_tokens_are_not(spm):
    ours = converted(spm)
    special = {
        str(token.content) for token in ours.get_added_tokens_decoder().values() if token.special
    }
    assert special == {"<unk>", "<s>", "</s>", "[INST]"}
    assert ours.decode(ours.encode("<tool>").ids) == "<tool>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "nobody-knows"}, "'nobody-knows' is not supported"),
        ({"tokenizer.ggml.model": "rwkv"}, "model 'rwkv' is not supported"),
        ({"tokenizer.ggml.model": None}, "missing or not a text"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "the same token twice"),
        ({"tokenizer.ggml.tokens": None}, "tokens' is missing"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is not a pair"),
        ({"tokenizer.ggml.merges": ["a z"]}, "merges cannot be used"),
        ({"tokenizer.ggml.merges": [""]}, "is not a pair"),
        ({"tokenizer.ggml.token_type": [1]}, "one number for each token"),
        ({"tokenizer.ggml.bos_token_id": 9}, "9 is no token"),
        ({"tokenizer.ggml.add_bos_token": 1}, "is not a boolean"),
    ],
)
def test_a_tokenizer_that_cannot_be_converted_is_named(change, message):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    path = Path("x.gguf")
    assert Tokenizer.from_str(convert_tokenizer(metadata, path).tokenizer_json).encode(
        "ab"
    ).ids == [2]
    with pytest.raises(WeightError, match=message) as caught:
        convert_tokenizer(metadata | change, path)
    assert str(caught.value).startswith("x.gguf: ")
