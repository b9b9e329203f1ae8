"""What the host packs is what the device's columns and bits mean."""

import numpy as np
import pytest

from jaxserve.engine import packing
from jaxserve.engine.packing import Layout, Limits, blob_layout, empty_blob, narrow_params
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.sequence import sequence_for
from jaxserve.ops.sampling_state import Float, Int, Option, pack_narrow

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
    parts = blob_layout(LIMITS, 64, 4).split(empty_blob(LIMITS, 64, 4))
    assert (parts["row_slots"] == 4).all() and (parts["admitted_slots"] == 4).all()
    assert (parts["grant_places"] == 4 * 8).all() and not parts["counts"].any()
