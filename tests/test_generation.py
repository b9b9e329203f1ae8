import dataclasses

import pytest

from jaxserve.engine.info import EngineInfo
from jaxserve.engine.request import Request, SamplingParams, TokenLogprobs, Update
from jaxserve.errors import EngineStopped, PromptTooLong, RequestError
from jaxserve.generation import Assembler, build_requests
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.text.tokenizer import Tokenizer
from tests.fakes import byte_tokenizer
from tests.text.small_tokenizers import byte_level

BYTES = byte_tokenizer()
EOS = BYTES.eos_id
INFO = EngineInfo(
    model="fake",
    max_model_len=32,
    vocab_size=260,
    max_logprobs=5,
    max_num_seqs=4,
    max_waiting=64,
    max_num_batched_tokens=64,
    page_size=4,
    num_pages=8,
    num_slots=4,
    eos_tokens=(EOS,),
    device="none",
    dtype="none",
    quantization="none",
    kv_cache_dtype="float32",
    attention="none",
    num_programs=0,
    ready_s=0.0,
)


def build(prompt="hello", tokenizer=BYTES, info=INFO, draw_seed=lambda: 77, **params):
    return build_requests(
        "id", prompt, SamplingParams(**params), tokenizer=tokenizer, info=info, draw_seed=draw_seed
    )


def assemble(updates, **params):
    """Returns the deltas of one sample for (tokens, finish reason, stop token) triples."""
    request = Request(request_id="id", prompt_tokens=(1,), params=SamplingParams(**params))
    assembler = Assembler(request, BYTES)
    return [
        assembler.push(
            Update(
                request_id="id", tokens=tuple(tokens), finish_reason=reason, stop_token=stop_token
            )
        )
        for tokens, reason, stop_token in updates
    ]


def test_what_an_answer_must_look_like_becomes_a_grammar_for_the_engine():
    for request in build(n=2, structured_outputs=StructuredOutputsParams(regex="a+")):
        assert request.params.structured_outputs is None
        assert "a+" in request.params.grammar.source
    assert build()[0].params.grammar is None


def test_the_last_token_of_a_complete_answer_is_text():
    assembler = Assembler(Request(request_id="id", prompt_tokens=(1,)), BYTES)
    last = Update(request_id="id", tokens=(97, 98), finish_reason="stop", is_complete=True)
    assert assembler.push(last).text == "ab"


def test_one_sample_keeps_its_id_and_several_are_numbered():
    assert [request.request_id for request in build()] == ["id"]
    requests = build(n=3, seed=5)
    assert [request.request_id for request in requests] == ["id-0", "id-1", "id-2"]
    assert [request.params.seed for request in requests] == [5, 6, 7]
    assert {request.params.n for request in requests} == {1}
    assert {request.prompt_tokens for request in requests} == {tuple(b"hello")}


def test_a_sampled_request_without_seed_gets_one_and_a_greedy_one_does_not():
    assert build()[0].params.seed == 77
    assert build(seed=-1)[0].params.seed == 77
    assert build(temperature=0)[0].params.seed is None
    seeds = {
        build_requests("id", "a", SamplingParams(), tokenizer=BYTES, info=INFO)[0].params.seed
        for _ in range(4)
    }
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_of_samples_stay_in_range_and_apart():
    seeds = [request.params.seed for request in build(n=3, seed=2**63 - 2)]
    assert seeds == [2**63 - 2, 2**63 - 1, 0]


def test_a_priority_needs_the_policy_that_heeds_it():
    def build_with(info):
        params = SamplingParams()
        return build_requests("id", "a", params, tokenizer=BYTES, info=info, priority=1)

    with pytest.raises(RequestError, match="scheduling_policy") as caught:
        build_with(INFO)
    assert caught.value.param == "priority"
    by_priority = dataclasses.replace(INFO, scheduling_policy="priority")
    assert build_with(by_priority)[0].priority == 1


def test_only_the_first_sample_brings_prompt_logprobs():
    requests = build(n=2, prompt_logprobs=1)
    assert [request.params.prompt_logprobs for request in requests] == [1, None]


def test_max_tokens_is_cut_to_what_fits_next_to_the_prompt():
    assert build(max_tokens=None)[0].params.max_tokens == 27
    assert build(max_tokens=32, min_tokens=30)[0].params.max_tokens == 27
    assert build(max_tokens=32, min_tokens=30)[0].params.min_tokens == 27
    assert build(max_tokens=3)[0].params.max_tokens == 3
    assert build("a" * 31, max_tokens=9)[0].params.max_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ("", {}, "prompt"),
        ([], {}, "prompt"),
        ([1, 260], {}, "prompt"),
        ([1, -1], {}, "prompt"),
        ([1, True], {}, "prompt"),
        ([1, "a"], {}, "prompt"),
        ("a" * 32, {}, "prompt"),
        ("a", {"max_tokens": 33}, "max_tokens"),
        ("a", {"stop": "x", "detokenize": False}, "stop"),
        ("a", {"logprobs": 6}, "logprobs"),
        ("a", {"prompt_logprobs": 6}, "prompt_logprobs"),
        ("a", {"logit_bias": {260: 1.0}}, "logit_bias"),
        ("a", {"allowed_token_ids": [260]}, "allowed_token_ids"),
        ("a", {"stop_token_ids": [-1]}, "stop_token_ids"),
        ("a", {"bad_words": [" "]}, "bad_words"),
        ("a", {"bad_words": ["nine bytes"]}, "bad_words"),
    ],
)
def test_what_the_model_cannot_serve_is_refused_by_name(prompt, params, param):
    with pytest.raises(RequestError) as caught:
        build(prompt, **params)
    assert caught.value.param == param


def test_a_prompt_that_fills_the_context_names_both_numbers():
    with pytest.raises(PromptTooLong, match="32 tokens.*holds 32"):
        build("a" * 32)


def test_bad_words_count_with_and_without_a_space_before_them():
    tokenizer = Tokenizer(byte_level())
    info = dataclasses.replace(INFO, vocab_size=tokenizer.vocab_size)
    [request] = build("a", tokenizer, info, bad_words=["the", " the"])
    spellings = [tokenizer.decode(word) for word in request.params.bad_word_tokens]
    assert spellings == ["the", " the", "the", " the"]
    # Bytes alone: the space would be a token of its own, so it adds nothing.
    [request] = build(bad_words=["ab"])
    assert request.params.bad_word_tokens == (tuple(b"ab"),)


def test_text_and_tokens_come_as_they_are_generated():
    first, second = assemble([(b"he", None, None), (b"y", "length", None)])
    assert (first.text, first.tokens, first.finish_reason) == ("he", tuple(b"he"), None)
    assert (second.text, second.finish_reason, second.stop_reason) == ("y", "length", None)


def test_eos_is_a_token_but_not_text():
    [delta] = assemble([((*b"hi", EOS), "stop", None)], skip_special_tokens=False)
    assert (delta.text, delta.tokens) == ("hi", (*b"hi", EOS))
    assert (delta.finish_reason, delta.stop_reason) == ("stop", None)


def test_a_stop_token_is_the_reason_and_shown_only_on_request():
    updates = [(b"hi!", "stop", ord("!"))]
    [hidden] = assemble(updates)
    assert (hidden.text, hidden.stop_reason, hidden.tokens) == ("hi", 33, tuple(b"hi!"))
    [shown] = assemble(updates, include_stop_str_in_output=True)
    assert shown.text == "hi!"


def test_a_stop_string_ends_the_sample_before_the_engine_does():
    first, second, third = assemble(
        [(b"hi", None, None), (b" END of", None, None), (b"it", None, None)], stop="END"
    )
    assert (first.text + second.text, first.must_abort, second.must_abort) == ("hi ", False, True)
    assert (second.finish_reason, second.stop_reason) == ("stop", "END")
    assert second.tokens == tuple(b" END")
    assert third.tokens == () and third.text == "" and third.finish_reason is None


def test_a_stop_string_in_the_last_tokens_wins_over_length():
    [delta] = assemble([(b"hi END", "length", None)], stop="END")
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("hi ", "stop", "END")
    assert not delta.must_abort


def test_held_back_text_is_shown_at_the_end():
    first, second = assemble([(b"hi EN", None, None), ((EOS,), "stop", None)], stop="END")
    assert (first.text, second.text, second.stop_reason) == ("hi ", "EN", None)


def test_without_detokenize_there_are_tokens_only():
    [delta] = assemble([(b"hi", "length", None)], detokenize=False)
    assert (delta.text, delta.tokens, delta.finish_reason) == ("", tuple(b"hi"), "length")


def test_an_error_of_the_engine_is_raised():
    assembler = Assembler(Request(request_id="id", prompt_tokens=(1,)), BYTES)
    with pytest.raises(EngineStopped, match="on fire"):
        assembler.push(Update(request_id="id", error="on fire"))


def test_logprobs_carry_text_bytes_and_offsets():
    request = Request(
        request_id="id", prompt_tokens=tuple(b"a\xc3\xa9"), params=SamplingParams(logprobs=1)
    )
    made = tuple(
        TokenLogprobs(token=token, logprob=-1.0, rank=2, top=((98, -0.5),))
        for token in (*"é!".encode(), EOS)
    )
    delta = Assembler(request, BYTES).push(
        Update(
            request_id="id",
            tokens=tuple(position.token for position in made),
            logprobs=made,
            prompt_logprobs=(None, made[0], made[1]),
            finish_reason="stop",
        )
    )
    assert [position.offset for position in delta.logprobs] == [0, 0, 1, 2]
    assert [position.chosen.data for position in delta.logprobs] == [
        b"\xc3",
        b"\xa9",
        b"!",
        b"<eos>",
    ]
    assert delta.logprobs[0].chosen.text == "\ufffd"
    [top] = delta.logprobs[0].top
    assert (top.token, top.text, top.logprob, top.rank) == (98, "b", -0.5, 1)
    assert delta.prompt_logprobs[0] is None
    assert [position.offset for position in delta.prompt_logprobs[1:]] == [1, 1]


def test_logprobs_end_with_the_stop_string():
    request = Request(
        request_id="id", prompt_tokens=(1,), params=SamplingParams(logprobs=0, stop="b")
    )
    made = tuple(TokenLogprobs(token=token, logprob=-1.0, rank=1, top=()) for token in b"abc")
    delta = Assembler(request, BYTES).push(
        Update(request_id="id", tokens=tuple(b"abc"), logprobs=made)
    )
    assert [position.chosen.text for position in delta.logprobs] == ["a", "b"]
