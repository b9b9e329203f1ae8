"""What the host packs is what the device's columns and bits mean."""

import dataclasses

import numpy as np
import pytest

from jaxserve.engine import packing
from jaxserve.engine.packing import (
    Layout,
    Limits,
    blob_layout,
    bucket_for,
    empty_blob,
    empty_extras,
    extras_layout,
    narrow_params,
    pack,
)
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.sequence import sequence_for
from jaxserve.ops.sampling_state import Float, Int, Option, pack_narrow
from tests.engine.fake_device import request, results_of, scheduler_of

LIMITS = Limits(
    num_slots=4,
    pages_per_sequence=8,
    page_size=4,
    vocab_size=100,
    max_model_len=32,
    max_step_tokens=64,
)


def sequence_of(**params):
    request = Request(request_id="a", prompt_tokens=(1, 2), params=SamplingParams(**params))
    return sequence_for(request, key=(0, 0), eos_tokens=frozenset(), max_model_len=32)


def test_narrow_columns_are_the_devices():
    assert (packing.NUM_FLOATS, packing.NUM_INTS) == (len(Float), len(Int))
    values = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.8,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "top_k": 7,
        "seed": 2**40 + 3,
        "min_tokens": 2,
    }
    floats, ints = narrow_params(sequence_of(**values, logprobs=5))
    expected_floats, expected_ints = pack_narrow(**values, num_logprobs=5)
    np.testing.assert_array_equal(floats, expected_floats)
    np.testing.assert_array_equal(ints, expected_ints)


@pytest.mark.parametrize(
    ("params", "option"),
    [
        ({}, Option.NONE),
        ({"logit_bias": {3: 1.0}}, Option.LOGIT_BIAS),
        ({"allowed_token_ids": (3,)}, Option.ALLOWED_TOKENS),
        ({"bad_word_tokens": ((3,),)}, Option.BAD_WORDS),
    ],
)
def test_option_bits_are_the_devices(params, option):
    _, ints = narrow_params(sequence_of(**params))
    assert ints[Int.OPTIONS] == option.value


def test_a_layouts_parts_cover_it_without_overlap():
    layout = blob_layout(LIMITS, 64, 4)
    flat = np.zeros(layout.size, np.int32)
    for index, part in enumerate(layout.split(flat).values()):
        assert not part.any()
        part.fill(index + 1)
    assert flat.all()
    assert Layout((("a", (2,)), ("b", (3, 4)))).size == 14


def test_an_empty_blob_names_no_slot_and_no_page():
    (blob,) = empty_blob(LIMITS, 64, 4)
    parts = blob_layout(LIMITS, 64, 4).split(blob)
    assert (parts["row_slots"] == 4).all() and (parts["admitted_slots"] == 4).all()
    assert (parts["grant_places"] == 4 * 8).all() and not parts["counts"].any()


BUCKETS = ((1, 1), (2, 2), (4, 4), (16, 4), (64, 4))


def scheduler_on(num_ranks, **options):
    """Returns a scheduler whose plans `limits_on(num_ranks)` describe."""
    sizes = {"max_page_grants": LIMITS.max_grants, "max_step_tokens": 64}
    return scheduler_of(num_ranks=num_ranks, **sizes, **options)


def limits_on(num_ranks):
    return dataclasses.replace(LIMITS, num_ranks=num_ranks)


def parts_of(packed, rank):
    """Returns one rank's part of the blob, by name."""
    return blob_layout(LIMITS, packed.num_tokens, packed.num_rows).split(packed.blob[rank])


def extras_of(packed, rank):
    """Returns one rank's part of the extras, by name."""
    return extras_layout(LIMITS).split(packed.extras[rank])


def test_a_rank_s_spans_are_packed_one_token_ones_first():
    scheduler = scheduler_on(1, max_step_rows=16)
    scheduler.add(request("decode", [6]))
    scheduler.plan_step()
    scheduler.add(request("scored", [3, 1, 4, 1, 5], prompt_logprobs=0))
    scheduler.add(request("single", [9]))
    plan = scheduler.plan_step()
    packed = pack(plan, LIMITS, ((64, 8),))
    parts = parts_of(packed, 0)
    # In plan order: decode, single, scored.
    assert packed.places == ((0, 0), (0, 1), (0, 2))
    assert parts["counts"].tolist() == [2, 3]
    assert parts["tokens"][:8].tolist() == [0, 9, 3, 1, 4, 1, 5, 0]
    assert parts["takes_device_token"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert parts["sequence_slots"].tolist() == [0, 2, 1, 4, 4, 4, 4, 4]
    assert parts["kv_lens"].tolist() == [2, 1, 5, 0, 0, 0, 0, 0]
    assert parts["cu_q_lens"].tolist() == [0, 1, 2, 7, 7, 7, 7, 7, 7]
    assert parts["row_tokens"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    assert parts["row_slots"].tolist() == [0, 2, 1, 1, 1, 1, 1, 4]
    assert parts["row_targets"].tolist() == [-1, -1, 1, 4, 1, 5, -1, -1]
    assert parts["admitted_slots"].tolist() == [1, 2, 4, 4, 4, 4, 4, 4]


def test_results_of_spans_packed_out_of_plan_order_are_found():
    scheduler = scheduler_on(1, max_step_rows=16)
    scheduler.add(request("scored", [3, 1, 4], prompt_logprobs=0))
    scheduler.add(request("long", [1, 2]))
    plan = scheduler.plan_step()
    # A chunk of one token that samples nothing goes first in the blob, last in the plan.
    chunk = plan.spans[1]._replace(count=1, samples=False, num_rows=0)
    plan = dataclasses.replace(plan, spans=(plan.spans[0], chunk))
    packed = pack(plan, LIMITS, ((64, 8),))
    assert packed.places == ((0, 0), (0, 0))
    parts = parts_of(packed, 0)
    assert parts["tokens"][:5].tolist() == [1, 3, 1, 4, 0]
    assert parts["row_tokens"][:4].tolist() == [1, 2, 3, 0]
    assert parts["sequence_slots"][:3].tolist() == [1, 0, 4]


def test_each_rank_gets_its_own_part_and_results_their_rank_and_row():
    scheduler = scheduler_on(2)
    scheduler.add(request("a", range(1, 10)))
    scheduler.add(request("b", [11, 12]))
    scheduler.add(request("c", [21]))
    packed = pack(scheduler.plan_step(), limits_on(2), BUCKETS)
    assert packed.blob.shape == (2, blob_layout(LIMITS, 16, 4).size)
    assert (packed.num_tokens, packed.num_rows, packed.extras) == (16, 4, None)
    names = [span.sequence.request.request_id for span in packed.spans]
    places = dict(zip(names, packed.places, strict=True))
    assert places == {"a": (0, 0), "c": (1, 0), "b": (1, 1)}
    first, second = parts_of(packed, 0), parts_of(packed, 1)
    assert first["counts"].tolist() == [0, 1] and second["counts"].tolist() == [1, 2]
    assert first["tokens"].tolist() == [*range(1, 10), *[0] * 7]
    assert second["tokens"].tolist() == [21, 11, 12, *[0] * 13]
    assert first["sequence_slots"].tolist() == [0, 4, 4, 4]
    assert second["sequence_slots"].tolist() == [1, 0, 4, 4]
    assert first["admitted_slots"].tolist() == [0, 4, 4, 4]
    assert second["admitted_slots"].tolist() == [0, 1, 4, 4]
    assert first["grant_places"][:4].tolist() == [0, 1, 2, 32]
    assert second["grant_places"][:3].tolist() == [0, 8, 32]
    assert first["grant_pages"][:4].tolist() == [0, 1, 2, 0]
    assert second["grant_pages"][:3].tolist() == [0, 1, 0]


def test_an_empty_rank_s_part_is_that_of_an_empty_blob():
    scheduler = scheduler_on(3)
    scheduler.add(request("a", [1, 2], presence_penalty=1.0))
    scheduler.add(request("b", [3, 4]))
    packed = pack(scheduler.plan_step(), limits_on(3), BUCKETS)
    empty = empty_blob(limits_on(3), packed.num_tokens, packed.num_rows)
    assert empty.shape == packed.blob.shape
    equals = [np.array_equal(*pair) for pair in zip(packed.blob, empty, strict=True)]
    assert equals == [False, False, True]


def test_extras_of_one_rank_leave_the_others_empty():
    scheduler = scheduler_on(2)
    scheduler.add(request("plain", [1, 2]))
    scheduler.add(request("biased", [3, 4], logit_bias={7: 2.0}, presence_penalty=1.0))
    packed = pack(scheduler.plan_step(), limits_on(2), BUCKETS)
    assert [parts_of(packed, rank)["has_extras"].item() for rank in range(2)] == [0, 1]
    assert packed.extras.shape == (2, extras_layout(LIMITS).size)
    np.testing.assert_array_equal(packed.extras[0], empty_extras(limits_on(2))[0])
    parts = extras_of(packed, 1)
    assert parts["wide_slots"].tolist() == [0, 4, 4, 4]
    assert parts["bias_tokens"][0, :2].tolist() == [7, 100]
    assert parts["bias_values"].view(np.float32)[0, 0] == 2.0
    assert parts["history_slots"][:3].tolist() == [0, 0, 4]
    assert parts["history_tokens"][:2].tolist() == [3, 4]


def test_extras_of_several_ranks_keep_apart():
    scheduler = scheduler_on(2)
    for rank in range(2):
        scheduler.add(request(f"wide {rank}", [1], min_tokens=1, stop_token_ids=(50 + rank,)))
    for rank in range(2):
        scheduler.add(request(f"counted {rank}", [60 + rank], frequency_penalty=1.0))
    packed = pack(scheduler.plan_step(), limits_on(2), BUCKETS)
    for rank in range(2):
        parts = extras_of(packed, rank)
        assert parts["wide_slots"].tolist() == [0, 4, 4, 4]
        assert parts["stop_tokens"][0, :2].tolist() == [50 + rank, 100]
        assert parts["history_slots"][:2].tolist() == [1, 4]
        assert parts["history_tokens"][0] == 60 + rank


def test_a_moved_sequence_takes_its_outputs_to_the_new_rank_as_history():
    scheduler = scheduler_on(2)
    scheduler.add(request("filler", [5], max_tokens=9))
    scheduler.add(request("counted", [1, 2], frequency_penalty=1.0, max_tokens=9))
    for _ in range(2):
        plan = scheduler.plan_step()
        scheduler.commit(plan, results_of(plan, 8))
    (sequence,) = [each for each in scheduler.running if each.rank == 1]
    sequence.rank, sequence.slot = 0, 3
    plan = dataclasses.replace(plan, spans=(), grants=(), admitted=(sequence,))
    packed = pack(plan, limits_on(2), BUCKETS)
    parts = extras_of(packed, 0)
    assert parts["history_slots"][:5].tolist() == [3, 3, 3, 3, 4]
    assert parts["history_tokens"][:4].tolist() == [1, 2, 8, 8]
    assert parts["history_is_output"][:5].tolist() == [0, 0, 1, 1, 0]


def plan_with(prompts, **options):
    """Returns the plan that admits a request for each prompt on 2 ranks."""
    scheduler = scheduler_on(2, **options)
    for number, prompt in enumerate(prompts):
        scheduler.add(request(str(number), prompt))
    return scheduler.plan_step()


@pytest.mark.parametrize(
    ("prompts", "bucket"),
    [
        ([[1]], (1, 1)),
        ([[1], [1]], (1, 1)),
        ([[1], [1], [1]], (2, 2)),
        ([[1], [1, 2]], (16, 4)),  # one rank's prefill: no bucket of one-token sequences
        ([range(17), [1]], (64, 4)),
        ([range(17), [1], [1], [1]], (64, 4)),
    ],
)
def test_the_bucket_holds_the_fullest_rank(prompts, bucket):
    assert bucket_for(plan_with(prompts), BUCKETS) == bucket


def test_a_bucket_has_a_row_for_each_sequence_even_of_those_without_logits():
    scheduler = scheduler_on(1, max_step_rows=1)
    for name in "ab":
        scheduler.add(request(name, [1, 2]))
    plan = scheduler.plan_step()
    assert (plan.num_rows, plan.num_sequences) == (1, 2)
    assert bucket_for(plan, ((8, 1), (8, 2))) == (8, 2)


def test_a_plan_beyond_all_buckets_is_an_error_with_its_counts():
    with pytest.raises(AssertionError, match=r"plan\.num_tokens=17 rows=3"):
        bucket_for(plan_with([range(17), [1], [1], [1]]), ((16, 4),))
