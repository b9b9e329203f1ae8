import itertools
import random

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from jaxserve.text.detokenizer import MAX_HELD_TOKENS, TextStream
from jaxserve.text.tokenizer import Tokenizer
from tests.fakes import byte_tokenizer
from tests.text.small_tokenizers import byte_level, sentencepiece

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
BYTE_LEVEL = Tokenizer(byte_level(), special_tokens=NAMES)
SENTENCEPIECE = Tokenizer(sentencepiece(), special_tokens={**NAMES, "unk_token": "<unk>"})
BYTES = byte_tokenizer()


def word_piece():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {"[UNK]": 0, "play": 1, "##ing": 2, "cat": 3, "[SEP]": 4}, unk_token="[UNK]"
        )
    )
    backend.decoder = tokenizers.decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[SEP]"])
    return Tokenizer(backend)


WORDS = word_piece()
ALL = pytest.mark.parametrize(
    "tokenizer", [BYTE_LEVEL, SENTENCEPIECE, WORDS], ids=["bytes", "pieces", "words"]
)


def stream_text(stream, tokens, sizes=(1,)):
    """Returns what a stream gives for `tokens`, pushed in groups of `sizes`, and its stop."""
    text, sizes = "", itertools.cycle(sizes)
    while tokens:
        size = next(sizes)
        group, tokens = tokens[:size], tokens[size:]
        delta = stream.push(group, final=not tokens)
        text += delta.text
        if delta.stop is not None:
            return text, delta.stop
    return text, None


def test_special_tokens_can_be_shown_one_by_one():
    user, end = BYTES.token_of("<|user|>"), BYTES.token_of("<|end|>")
    for shown, text in (((), "ab"), (("<|end|>",), "a<|end|>b")):
        stream = TextStream(BYTES, shown_special_tokens=shown)
        assert stream_text(stream, [user, *b"a", end, *b"b"]) == (text, None)


@ALL
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_deltas_joined_are_the_decoded_whole_for_any_tokens(tokenizer, skip, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), min_size=1, max_size=40))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    stops = data.draw(st.sampled_from([(), ("\x00never\x00", "e\x00")]))
    stream = TextStream(tokenizer, skip_special_tokens=skip, stop=stops)
    text, _ = stream_text(stream, tokens, sizes)
    assert text == tokenizer.decode(tokens, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE, BYTES])
@given(text=st.text(alphabet=st.sampled_from("a é日😀👩‍👧\n"), min_size=1))
@settings(max_examples=60, deadline=None)
def test_valid_text_is_never_broken(tokenizer, text):
    stream = TextStream(tokenizer)
    deltas = [stream.push([token]).text for token in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(deltas)
    assert "".join(deltas) == text


def test_an_emoji_appears_when_its_last_byte_does():
    stream = TextStream(BYTES)
    assert [stream.push([byte]).text for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]


def test_a_truncated_character_is_flushed_as_a_replacement():
    stream = TextStream(BYTES)
    assert stream.push(list("a😀".encode()[:3])).text == "a"
    assert stream.push([], final=True).text == "\ufffd"


def test_stray_bytes_do_not_hold_up_the_stream():
    stream = TextStream(BYTES)
    assert stream.push([0x80] * 20).text == "\ufffd" * 20


def test_a_neighbour_decoder_holds_a_broken_end_only_so_long():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"\ufffd": 0}, unk_token="\ufffd"))
    stream = TextStream(Tokenizer(backend))
    lengths = [len(stream.push([0]).text) > 0 for _ in range(MAX_HELD_TOKENS)]
    assert lengths == [False] * (MAX_HELD_TOKENS - 1) + [True]


def test_the_first_space_is_dropped_only_at_the_start_of_a_text():
    word = SENTENCEPIECE.encode("hello")
    assert TextStream(SENTENCEPIECE).push(word).text == "hello"
    bos = [SENTENCEPIECE.bos_id]
    assert TextStream(SENTENCEPIECE, prompt_tokens=bos).push(word).text == "hello"
    prompt = bos + SENTENCEPIECE.encode("the cat")
    assert TextStream(SENTENCEPIECE, prompt_tokens=prompt).push(word).text == " hello"


def test_a_neighbour_decoder_sees_the_prompt():
    assert TextStream(WORDS, prompt_tokens=[1]).push([2, 3, 2]).text == "ing cating"


def test_spaces_between_special_tokens_can_be_left_out():
    def text(spaces):
        stream = TextStream(WORDS, skip_special_tokens=False, spaces_between_special_tokens=spaces)
        return stream.push([3, 4, 4]).text

    assert text(True) == "cat [SEP] [SEP]"
    assert text(False) == "cat [SEP][SEP]"


@pytest.mark.parametrize(
    ("text", "stop", "shown", "found"),
    [
        ("hello world", ("wor",), "hello ", "wor"),
        ("hello", ("xyz",), "hello", None),
        ("aab", ("ab",), "a", "ab"),
        ("aaab", ("aab",), "a", "aab"),
        ("abc", ("abc", "b"), "a", "b"),  # the one that is complete first
        ("xabc", ("bc", "abc"), "x", "abc"),  # complete together: the longer one
        ("one\n\ntwo", ("\n\n",), "one", "\n\n"),
        ("ends with ab", ("abc",), "ends with ab", None),
        ("stop", ("stop",), "", "stop"),
        ("1😀2", ("😀",), "1", "😀"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_end_the_text_however_it_is_pushed(text, stop, shown, found, size):
    tokens = list(text.encode())
    assert stream_text(TextStream(BYTES, stop=stop), tokens, (size,)) == (shown, found)
    stream = TextStream(BYTES, stop=stop, include_stop=True)
    assert stream_text(stream, tokens, (size,)) == (shown + (found or ""), found)


def first_stop(text, stops):
    """Returns the stop string found by looking at ever longer beginnings of `text`."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(
    text=st.text(alphabet="abc", min_size=1, max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_as_by_a_plain_search(text, stops, sizes):
    stream = TextStream(BYTES, stop=tuple(stops))
    assert stream_text(stream, list(text.encode()), sizes) == first_stop(text, stops)


def test_text_that_could_begin_a_stop_string_is_held_back():
    stream = TextStream(BYTES, stop=("<end>",))
    pushed = [stream.push([byte]).text for byte in b"a<en b<e"]
    assert pushed == ["a", "", "", "", "<en ", "b", "", ""]
    assert stream.push([], final=True).text == "<e"


def test_a_stop_string_does_not_count_before_min_tokens():
    stream = TextStream(BYTES, stop=("ab",), min_tokens=3)
    assert stream_text(stream, list(b"xabyabz")) == ("xaby", "ab")
    stream = TextStream(BYTES, stop=("ab",), min_tokens=3)
    assert stream_text(stream, list(b"xabyabz"), (100,)) == ("xaby", "ab")
    stream = TextStream(BYTES, stop=("ab",), min_tokens=2)
    assert stream_text(stream, list(b"xab")) == ("x", "ab")


def test_tokens_after_a_stop_string_are_not_used():
    delta = TextStream(BYTES, stop=("lo",)).push(list(b"hello there"))
    assert (delta.text, delta.stop, delta.num_tokens) == ("hel", "lo", 5)


def test_offsets_say_where_each_token_starts():
    stream = TextStream(BYTES)
    assert stream.push(list("aé".encode())).offsets == (0, 1, 1)
    assert stream.push(list(b"b")).offsets == (2,)


def test_streams_of_one_tokenizer_do_not_mix():
    rng = random.Random(0)
    texts = ["".join(rng.choices("aé日😀 ", k=30)) for _ in range(5)]
    streams = [TextStream(BYTES) for _ in texts]
    outputs = [""] * len(texts)
    for index, step in itertools.product(range(130), range(len(texts))):
        tokens = list(texts[step].encode())[index : index + 1]
        outputs[step] += streams[step].push(tokens).text
    assert outputs == texts
