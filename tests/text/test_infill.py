"""Where the marks of a fill-in prompt go."""

from jaxserve.text.infill import infill_prompt, infill_tokens
from tests.fakes import byte_tokenizer

MARKS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


def test_the_marks_stand_before_prefix_suffix_and_middle():
    for marks in (MARKS, ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]):
        tokenizer = byte_tokenizer(marks=marks)
        found = infill_tokens(tokenizer)
        assert found == tuple(map(tokenizer.token_of, marks))
        tokens = infill_prompt("ab", "cd", found, tokenizer)
        assert tokens == [found.prefix, 97, 98, found.suffix, 99, 100, found.middle]


def test_a_bos_stays_in_front():
    tokenizer = byte_tokenizer(marks=MARKS, add_bos_token=True)
    found = infill_tokens(tokenizer)
    tokens = infill_prompt("a", "b", found, tokenizer)
    assert tokens == [tokenizer.bos_id, found.prefix, 97, found.suffix, 98, found.middle]
    assert infill_prompt([97], "b", found, tokenizer) == tokens[1:]


def test_a_model_without_marks_does_not_fill_in():
    assert infill_tokens(byte_tokenizer()) is None
