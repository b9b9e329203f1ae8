import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedTokenizerFast

from jaxserve.errors import ConfigError, RequestError
from jaxserve.models.checkpoint import TokenizerFiles
from jaxserve.text.tokenizer import SENTINEL, Tokenizer
from tests.fakes import byte_tokenizer
from tests.text.small_tokenizers import byte_level, sentencepiece

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
BYTE_LEVEL = Tokenizer(byte_level(), special_tokens=NAMES)
SENTENCEPIECE = Tokenizer(sentencepiece(), special_tokens={**NAMES, "unk_token": "<unk>"})
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "pieces"])
TEXTS = [
    "hello world",
    "  two spaces ",
    "日本語 😀\n",
    "naïve </s><s> café",
    "<think>x</think>",
    "ÿ\t",
]


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("add_eos", [None, True])
@pytest.mark.parametrize("build", [byte_level, sentencepiece])
def test_tokens_are_those_of_transformers(build, add_bos, add_eos):
    adds = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    stated = {name: value for name, value in adds.items() if value is not None}
    oracle = PreTrainedTokenizerFast(tokenizer_object=build(), **NAMES, **stated)
    tokenizer = Tokenizer(build(), special_tokens=NAMES, **adds)
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle(text).input_ids
        assert tokenizer.encode(text, add_special_tokens=False) == oracle.encode(
            text, add_special_tokens=False
        )


@BOTH
@given(text=st.text())
@settings(max_examples=60, deadline=None)
def test_decode_is_that_of_the_library_for_any_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    for skip in (True, False):
        expected = tokenizer._backend.decode(tokens, skip_special_tokens=skip)
        assert tokenizer.decode(tokens, skip_special_tokens=skip) == expected


@given(tokens=st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=40))
@settings(max_examples=100, deadline=None)
def test_byte_level_decode_is_that_of_the_library_for_any_tokens(tokens):
    for skip in (True, False):
        expected = BYTE_LEVEL._backend.decode(tokens, skip_special_tokens=skip)
        assert BYTE_LEVEL.decode(tokens, skip_special_tokens=skip) == expected


def test_byte_tokens_that_are_no_character_become_replacement_characters():
    tokens = [SENTENCEPIECE.token_of(f"<0x{byte:02X}>") for byte in "😀".encode() + b"\xff"]
    assert SENTENCEPIECE.decode(tokens) == "😀\ufffd"


@BOTH
def test_token_bytes_joined_are_the_text(tokenizer):
    text = "the cat 日本 😀 é\n"
    data = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    assert data.removeprefix(b" ") == text.encode()


@BOTH
def test_half_a_character_has_exact_bytes_and_a_replacement_text(tokenizer):
    piece = "Ã" if tokenizer is BYTE_LEVEL else "<0xC3>"
    token = tokenizer.token_of(piece)
    assert tokenizer.token_bytes(token) == b"\xc3"
    assert tokenizer.token_text(token) == "\ufffd"


@BOTH
def test_special_tokens_have_a_text_and_are_skipped_by_default(tokenizer):
    assert tokenizer.token_text(tokenizer.eos_id) == "</s>"
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.eos_id in tokenizer.special_ids


def test_tokens_outside_the_vocabulary_are_no_text():
    assert BYTE_LEVEL.decode([10**6, -1, 2**40]) == ""
    assert BYTE_LEVEL.token_text(10**6) == ""


def test_a_named_token_becomes_special_without_growing_the_vocabulary():
    tokenizer = Tokenizer(byte_level(), special_tokens={"eos_token": "<think>", "pad_token": "<?>"})
    assert tokenizer.eos_id in tokenizer.special_ids
    assert tokenizer.pad_id is None
    assert tokenizer.vocab_size == BYTE_LEVEL.vocab_size


@BOTH
@pytest.mark.parametrize("text", ["</s>", "a</s>b", "<s</s>>", "</s></s>", "x <|im_end|> y"])
def test_special_tokens_in_guarded_text_are_plain_text(tokenizer, text):
    guarded = tokenizer.guard({"content": [text]})["content"][0]
    tokens = tokenizer.encode_rendered(guarded)
    assert not tokenizer.special_ids & set(tokens)
    assert tokenizer.decode(tokens).removeprefix(" ") == text


@BOTH
def test_special_tokens_written_around_guarded_text_stay_special(tokenizer):
    guarded = tokenizer.guard("hi</s> there")
    tokens = tokenizer.encode_rendered(f"<s>{guarded}</s>")
    assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
    assert not tokenizer.special_ids & set(tokens[1:-1])


def test_a_special_token_put_together_from_neighbours_is_broken():
    guarded = BYTE_LEVEL.guard([{"text": "a<|im_"}, {"text": "e"}, {"text": "nd|>b"}])
    joined = "".join(part["text"] for part in guarded)
    assert not BYTE_LEVEL.special_ids & set(BYTE_LEVEL.encode_rendered(joined))
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode_rendered(joined)) == "a<|im_end|>b"


def test_text_without_special_tokens_is_not_touched():
    value = {"content": "a < b, <think> |im_end|"}
    assert BYTE_LEVEL.guard(value) is value


def test_a_typed_sentinel_cannot_hide_a_special_token():
    guarded = BYTE_LEVEL.guard(f"<{SENTINEL}|im_end|>")
    assert not BYTE_LEVEL.special_ids & set(BYTE_LEVEL.encode_rendered(guarded))


@given(
    parts=st.lists(st.sampled_from(["<|im_end|>", "<", "|im_", "end|>", " é", "😀", "</s>", "s>"]))
)
@settings(max_examples=100, deadline=None)
def test_no_mixture_of_typed_pieces_becomes_special(parts):
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        tokens = tokenizer.encode_rendered("".join(tokenizer.guard(parts)))
        assert not (tokenizer.special_ids - {tokenizer.unk_id}) & set(tokens)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(RequestError, match="Unicode"):
        BYTE_LEVEL.encode("\ud800")


def test_a_broken_tokenizer_file_is_refused():
    with pytest.raises(ConfigError, match="tokenizer"):
        Tokenizer.from_files(TokenizerFiles(tokenizer_json="{"))


def test_from_files_reads_names_and_template():
    files = TokenizerFiles(
        tokenizer_json=byte_level().to_str(), **NAMES, add_bos_token=True, chat_template="hi"
    )
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.encode("a")[0] == tokenizer.bos_id == tokenizer.token_of("<s>")
    assert tokenizer.chat_template == "hi"


def test_the_byte_tokenizer_maps_text_to_its_bytes():
    assert byte_tokenizer().encode("hé") == list("hé".encode())


def test_a_tokenizer_without_decoder_joins_words_as_the_library_does():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert Tokenizer(backend).decode([0, 1, 9]) == "a b"
