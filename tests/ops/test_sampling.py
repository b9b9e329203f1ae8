import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops import vocab
from jaxserve.ops.probability_filters import NUM_CANDIDATES, filter_bounds
from jaxserve.ops.sampling import read_report, sample
from jaxserve.ops.sampling_state import (
    Int,
    Option,
    RowParams,
    SamplingRows,
    SamplingState,
    WideParams,
    admit_narrow,
    admit_wide,
    init_sampling_state,
    load_history,
    pack_narrow,
    record_tokens,
    set_grammar,
)

VOCAB = 300  # three blocks, the last one partly filled
SLOTS = 8
MAX_LOGPROBS = 5
SIZES = {"max_bias": 4, "max_bad_words": 3, "max_bad_word_tokens": 3, "max_stop_tokens": 2}
WORD_TOKENS = SIZES["max_bad_word_tokens"]

sample_jit = jax.jit(sample, static_argnames="max_logprobs")
admit_narrow_jit, admit_wide_jit = jax.jit(admit_narrow), jax.jit(admit_wide)
load_history_jit, record_tokens_jit = jax.jit(load_history), jax.jit(record_tokens)


@dataclasses.dataclass(frozen=True)
class Slot:
    """What a test asks of one row."""

    narrow: dict[str, float] = dataclasses.field(default_factory=dict)
    bias: dict[int, float] = dataclasses.field(default_factory=dict)
    allowed: tuple[int, ...] = ()
    grammar: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_tokens: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    listed: bool = False  # report the tokens of `bias`, which then biases nothing

    @property
    def options(self) -> Option:
        options = Option.LOGIT_BIAS if self.bias and not self.listed else Option.NONE
        options |= Option.LOGPROB_TOKENS if self.listed else Option.NONE
        options |= Option.ALLOWED_TOKENS if self.allowed else Option.NONE
        options |= Option.GRAMMAR if self.grammar else Option.NONE
        return options | (Option.BAD_WORDS if self.bad_words else Option.NONE)


def bitmask(tokens: tuple[int, ...], size: int = VOCAB) -> np.ndarray:
    bits = np.zeros(-(-size // 32) * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def padded(values: tuple[float, ...], length: int, fill: float) -> list[float]:
    return [*values, *[fill] * (length - len(values))]


def right_aligned(tokens: tuple[int, ...], length: int) -> list[int]:
    kept = tokens[max(0, len(tokens) - length) :]
    return [*[-1] * (length - len(kept)), *kept]


def wide_of(slots: list[Slot]) -> WideParams:
    words = [padded(slot.bad_words, SIZES["max_bad_words"], ()) for slot in slots]
    return WideParams(
        bias_tokens=np.array([padded(tuple(slot.bias), 4, VOCAB) for slot in slots], np.int32),
        bias_values=np.array(
            [padded(tuple(slot.bias.values()), 4, 0) for slot in slots], np.float32
        ),
        allowed=np.stack([bitmask(slot.allowed) for slot in slots]),
        bad_words=np.array(
            [[right_aligned(word, WORD_TOKENS) for word in row] for row in words], np.int32
        ),
        recent=np.array([right_aligned(slot.outputs, WORD_TOKENS - 1) for slot in slots], np.int32),
        stop_tokens=np.array([padded(slot.stop_tokens, 2, VOCAB) for slot in slots], np.int32),
    )


def state_of(slots: list[Slot], numbers: np.ndarray | None = None) -> SamplingState:
    """Admits `slots` under the given slot numbers, with a padding row behind each upload."""
    numbers = np.arange(len(slots)) if numbers is None else numbers
    narrow = [
        pack_narrow(num_output=len(slot.outputs), options=slot.options, **slot.narrow)
        for slot in slots
    ]
    numbers = np.array([*numbers, SLOTS], np.int32)
    floats, ints = (np.stack([*column, column[0] + 9]) for column in zip(*narrow, strict=True))
    state = init_sampling_state(SLOTS, VOCAB, **SIZES)
    state = admit_narrow_jit(state, numbers, floats, ints)
    state = admit_wide_jit(state, numbers, wide_of([*slots, Slot()]))
    state = set_grammar(
        state,
        numbers,
        wide_of(
            [*(dataclasses.replace(slot, allowed=slot.grammar) for slot in slots), Slot()]
        ).allowed,
    )
    history = [
        (number, token, is_output)
        for number, slot in zip(numbers, slots, strict=False)
        for tokens, is_output in ((slot.prompt, False), (slot.outputs, True))
        for token in tokens
    ]
    owners, tokens, is_output = zip(*history, (SLOTS, 0, True), strict=True)
    return load_history_jit(
        state, np.array(owners, np.int32), np.array(tokens, np.int32), np.array(is_output)
    )


def rows_of(slots: np.ndarray, positions: np.ndarray | int = 7, targets: int = -1) -> SamplingRows:
    full = np.zeros(len(slots), np.int32)
    return SamplingRows(
        slots=np.asarray(slots, np.int32),
        positions=np.asarray(full + positions, np.int32),
        targets=np.asarray(full + targets, np.int32),
    )


def run(
    logits: np.ndarray, state: SamplingState, rows: SamplingRows
) -> tuple[np.ndarray, np.ndarray]:
    """Samples, padded to SLOTS rows so that most tests share one compiled program."""
    count = len(logits)
    padding = rows_of(np.full(SLOTS - count, SLOTS))
    rows = jax.tree.map(lambda *parts: np.concatenate(parts), rows, padding)
    logits = np.concatenate([logits, np.zeros((SLOTS - count, VOCAB), np.float32)])
    tokens, report = sample_jit(logits, state, rows, max_logprobs=MAX_LOGPROBS)
    return np.asarray(tokens)[:count], np.asarray(report)[:count]


def choose(logits: np.ndarray, slots: list[Slot]) -> np.ndarray:
    return run(logits, state_of(slots), rows_of(np.arange(len(slots))))[0]


def draws(logits: np.ndarray, slot: Slot, count: int = 20_000) -> np.ndarray:
    """Tokens drawn for one slot at `count` positions."""
    rows = rows_of(np.full(count, 2), np.arange(count))
    state = state_of([slot], np.array([2]))
    many = jnp.broadcast_to(logits, (count, len(logits)))
    return np.asarray(sample_jit(many, state, rows, max_logprobs=0)[0])


def random_logits(rows: int, size: int = VOCAB, scale: float = 2.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, size)) * scale).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(np.float64(x) - x.max())
    return weights / weights.sum()


def filtered(
    logits: np.ndarray,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    typical_p: float = 1.0,
) -> np.ndarray:
    """The oracle: the distribution that the filters leave of one row, by sorting."""
    p = softmax(np.float64(logits) / temperature)
    p = np.where(p >= min_p * p.max(), p, 0)
    if 0 < top_k < len(p):
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
    p /= p.sum()
    if top_p < 1:
        before = np.array([p[p > own].sum() for own in p])
        p = np.where(before < top_p, p, 0)
        p /= p.sum()
    if typical_p < 1:
        surprise = np.where(p > 0, -np.log(np.where(p > 0, p, 1)), np.inf)
        distance = np.abs(surprise - (p * np.where(p > 0, surprise, 0)).sum())
        before = np.array([p[distance < own].sum() for own in distance])
        p = np.where(before < typical_p, p, 0)
    return p / p.sum()


def assert_drawn_from(tokens: np.ndarray, p: np.ndarray) -> None:
    """Chi-square against `p`, at five standard deviations; no token of probability 0."""
    counts = np.bincount(tokens, minlength=len(p))
    assert not counts[p == 0].any()
    expected = p * len(tokens)
    is_common = expected >= 5
    observed = [*counts[is_common], counts[~is_common].sum()]
    expected = np.array([*expected[is_common], expected[~is_common].sum() + 1e-9])
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert chi_square < len(expected) + 5 * np.sqrt(2 * len(expected)) + 5


def narrow(**options: float) -> Slot:
    return Slot(narrow=options)


# Greedy choices and what changes them.


def test_listed_tokens_are_reported_in_place_of_the_likeliest():
    logits = np.random.default_rng(3).normal(size=(3, VOCAB)).astype(np.float32)
    asked = {"num_logprobs": 3}
    slots = [Slot(narrow=asked), Slot(narrow=asked, bias={250: 9.0, 7: 0.0, 130: 0.0}, listed=True)]
    rows = rows_of(np.array([0, 1, 1]))
    rows.targets[2] = 5  # a prompt's row keeps the likeliest
    _, report = run(logits, state_of(slots), rows)
    read = read_report(report)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    likeliest = np.argsort(-logits, axis=1)[:, :3]
    assert read.top_tokens[1, :3].tolist() == [250, 7, 130]
    np.testing.assert_allclose(read.top_logprobs[1, :3], expected[1, [250, 7, 130]], atol=1e-5)
    for row in (0, 2):
        np.testing.assert_array_equal(read.top_tokens[row, :3], likeliest[row])
    assert read.tokens[1] == likeliest[1, 0]


def test_greedy_takes_the_first_largest_token():
    logits = random_logits(6)
    logits[0, [17, 150, 290]] = 50  # ties within and across blocks
    logits[1, 299] = 50
    logits[2] = 0
    np.testing.assert_array_equal(choose(logits, [Slot()] * 6), logits.argmax(1))


def test_greedy_ignores_filters_and_seed():
    slots = [narrow(top_k=1, top_p=0.1, seed=3), narrow(temperature=9e-6, typical_p=0.2)]
    logits = random_logits(2)
    np.testing.assert_array_equal(choose(logits, slots), logits.argmax(1))


def test_a_row_of_minus_infinity_still_yields_a_token_of_the_vocabulary():
    logits = np.full((2, VOCAB), -np.inf, np.float32)
    tokens = choose(logits, [Slot(), narrow(temperature=1.0, top_p=0.5, typical_p=0.5)])
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


# The token of a row whose logits fall from token 0 up, without and with each option.
RAMP = np.linspace(4, -2, VOCAB, dtype=np.float32)
GREEDY_CASES = {
    "bias up": (Slot(bias={5: 1.5, 200: 8.0}), 200),
    "bias down": (Slot(bias={0: -100.0, 1: -100.0}), 2),
    "allowed": (Slot(allowed=(250, 33, 298)), 33),
    "grammar": (Slot(grammar=(64, 299)), 64),
    "allowed and grammar": (Slot(allowed=(40, 64), grammar=(64, 2)), 64),
    "bias cannot undo a mask": (Slot(allowed=(9,), bias={3: 100.0}), 9),
    "min tokens": (Slot({"min_tokens": 2}, stop_tokens=(0, 1), outputs=(7,)), 2),
    "min tokens beat bias": (Slot({"min_tokens": 1}, stop_tokens=(0,), bias={0: 50.0}), 1),
    "bad word of one token": (Slot(bad_words=((0,), (1,))), 2),
    "bad word of three tokens": (Slot(bad_words=((8, 9, 0),), outputs=(5, 8, 9)), 1),
    "repetition of the prompt": (Slot({"repetition_penalty": 2.0}, prompt=(0, 1)), 2),
    "repetition of outputs": (Slot({"repetition_penalty": 2.0}, outputs=(0, 2)), 1),
    "presence": (Slot({"presence_penalty": 2.0}, outputs=(0, 1, 0)), 2),
    "frequency": (Slot({"frequency_penalty": 0.9}, outputs=(0,) * 4 + tuple(range(50)) * 2), 50),
}


@pytest.mark.parametrize("name", GREEDY_CASES)
def test_each_option_moves_the_greedy_choice_of_its_row_only(name: str):
    slot, expected = GREEDY_CASES[name]
    tokens = choose(np.stack([RAMP] * 3), [Slot(), slot, Slot()])
    assert RAMP.argmax() == 0 != expected
    np.testing.assert_array_equal(tokens, [0, expected, 0])


UNTOUCHED_CASES = {
    "min tokens reached": Slot({"min_tokens": 2}, stop_tokens=(0,), outputs=(7, 7)),
    "prefix of the bad word is missing": Slot(bad_words=((8, 9, 0),), outputs=(8, 9, 5)),
    "prefix of the bad word is incomplete": Slot(bad_words=((8, 9, 0),), outputs=(9,)),
    "bad words look at outputs only": Slot(bad_words=((8, 0),), prompt=(8,)),
    "presence looks at outputs only": Slot({"presence_penalty": 2.0}, prompt=(0,)),
    "frequency looks at outputs only": Slot({"frequency_penalty": 2.0}, prompt=(0,)),
}


@pytest.mark.parametrize("name", UNTOUCHED_CASES)
def test_an_option_that_does_not_apply_leaves_the_choice(name: str):
    assert choose(RAMP[None], [UNTOUCHED_CASES[name]])[0] == 0


def test_penalties_apply_in_vllm_order():
    logits = np.full(VOCAB, -9, np.float32)
    logits[[1, 2, 3]] = [3.0, -0.5, 0.4]
    options = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    slot = Slot({"temperature": 1.0, **options}, prompt=(2,), outputs=(1, 1, 3))
    logits_after = logits.copy()
    logits_after[[1, 2, 3]] = [3 / 1.5 - 1 - 0.25, -0.5 * 1.5, 0.4 / 1.5 - 0.5 - 0.25]
    tokens = draws(logits, slot)
    assert_drawn_from(tokens, softmax(logits_after))
    with pytest.raises(AssertionError):
        assert_drawn_from(tokens, softmax(logits))


# Filters.

FILTERS = [
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": NUM_CANDIDATES},
    {"top_k": NUM_CANDIDATES + 40},
    {"top_k": VOCAB + 5},
    {"top_p": 1e-6},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"top_p": 0.999},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 200, "top_p": 0.99},
    {"min_p": 0.02, "top_k": 30, "top_p": 0.9, "typical_p": 0.8},
]


def kept_tokens(logits: np.ndarray, filters: list[dict[str, float]]) -> np.ndarray:
    """Whether each token stays, by the bounds that `filter_bounds` finds."""
    packed = [pack_narrow(temperature=1.0, **options) for options in filters]
    params = RowParams(*(jnp.asarray(np.stack(column)) for column in zip(*packed, strict=True)))
    blocks = vocab.to_blocks(jnp.asarray(logits - logits.max(1, keepdims=True)))
    low, high = jax.jit(filter_bounds)(blocks, params)
    values = blocks.reshape(len(logits), -1)[:, : logits.shape[1]]
    return np.asarray((values >= low[:, None]) & (values <= high[:, None]) & (values > -np.inf))


@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_filters_keep_exactly_the_tokens_that_sorting_keeps(scale: float):
    logits = random_logits(len(FILTERS), scale=scale, seed=1)
    logits[:, 40:60] = -np.inf
    kept = kept_tokens(logits, FILTERS)
    for row, options in enumerate(FILTERS):
        expected = filtered(logits[row], **options) > 0
        np.testing.assert_array_equal(kept[row], expected, err_msg=str(options))


def test_filters_search_beyond_the_candidates_in_a_large_vocabulary():
    filters = [{"top_k": 3000}, {"top_p": 0.8}, {"top_k": 1000, "top_p": 0.9}, {"top_k": 40}] * 5
    logits = random_logits(20, 4999, scale=1.0)
    kept = kept_tokens(logits, filters)
    for row, options in enumerate(filters):
        expected = filtered(logits[row], **options) > 0
        np.testing.assert_array_equal(kept[row], expected, err_msg=str(options))
    assert kept.sum(1)[1] > NUM_CANDIDATES


def test_tokens_with_equal_logits_stay_or_go_together():
    logits = np.full((4, VOCAB), -3, np.float32)
    logits[:, [4, 130, 280]] = 2
    kept = kept_tokens(logits, [{"top_k": 2}, {"top_p": 0.1}, {"top_k": 70}, {"min_p": 0.9}])
    np.testing.assert_array_equal(kept.sum(1), [3, 3, VOCAB, 3])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, *FILTERS], ids=str)
def test_draws_follow_the_filtered_distribution(options: dict[str, float]):
    logits = random_logits(1, scale=1.5, seed=2)[0]
    options = {"temperature": 1.3, **options}
    expected = filtered(logits, **options)
    tokens = draws(logits, narrow(seed=11, **options))
    assert_drawn_from(tokens, expected)
    if np.abs(expected - filtered(logits)).sum() > 0.1:
        with pytest.raises(AssertionError):
            assert_drawn_from(tokens, filtered(logits))


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    # Half the mass on one token, half spread over 100,000 of probability 5e-6 each.
    size, count = 100_000, 4_000
    logits = np.zeros(size, np.float32)
    logits[70_000] = np.log(size)
    slots = jnp.zeros(1, jnp.int32)
    floats, ints = pack_narrow(temperature=1.0, seed=5)
    state = init_sampling_state(1, size, **SIZES)
    state = admit_narrow_jit(state, slots, floats[None], ints[None])

    @jax.jit
    def draw(state: SamplingState, logits: jax.Array) -> jax.Array:
        def one(position: jax.Array) -> jax.Array:
            row = SamplingRows(slots=slots, positions=position[None], targets=slots - 1)
            return sample(logits[None], state, row, max_logprobs=0)[0][0]

        return jax.lax.map(one, jnp.arange(count, dtype=jnp.int32))

    tokens = np.asarray(draw(state, logits))
    others = tokens[tokens != 70_000]
    assert abs(len(others) / count - 0.5) < 0.04
    assert_drawn_from(others // 5000, np.full(20, 0.05))


# Randomness belongs to the request.


def test_a_row_draws_the_same_token_alone_and_in_any_batch():
    slot = narrow(temperature=1.0, seed=-5, top_p=0.9)
    other = Slot(
        {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3, "typical_p": 0.9, "seed": 1},
        bias={3: 2.0},
        allowed=tuple(range(100)),
        bad_words=((4,),),
        outputs=(1, 2),
    )
    logits = random_logits(SLOTS)
    for position in range(20):
        alone = sample_jit(
            logits[:1], state_of([slot]), rows_of(np.array([0]), position), max_logprobs=0
        )[0]
        state = state_of([other, narrow(), slot, other], np.array([3, 1, 6, 0]))
        rows = rows_of(np.array([3, 1, SLOTS, 6, 0]), position)
        batch = sample_jit(logits[[1, 2, 3, 0, 4]], state, rows, max_logprobs=2)[0]
        assert batch[3] == alone[0]


def test_tokens_depend_on_every_bit_of_the_seed_and_on_the_position():
    logits = np.zeros(VOCAB, np.float32)
    streams = [
        tuple(draws(logits, narrow(temperature=1.0, seed=seed), 16))
        for seed in (0, 1, 1 << 31, 1 << 32, -1, 0)
    ]
    assert len(set(streams)) == 5 and streams[0] == streams[-1]
    assert len(set(streams[0])) > 8


# Log-probabilities.


def test_logprobs_are_of_the_raw_distribution_with_ranks_and_the_most_likely_tokens():
    logits = random_logits(4)
    slots = [
        Slot({"num_logprobs": 0}, bias={33: 100.0}),
        narrow(num_logprobs=MAX_LOGPROBS, temperature=1.7, top_k=20, presence_penalty=1.0),
        Slot(),
        narrow(num_logprobs=2),
    ]
    rows = rows_of(np.arange(4))
    _, report = run(logits, state_of(slots), rows)
    tokens, logprobs, ranks, top, top_logprobs = read_report(report)
    expected = np.log([softmax(row) for row in logits])
    assert tokens[0] == 33
    np.testing.assert_allclose(logprobs, expected[np.arange(4), tokens], rtol=1e-5)
    own = logits[np.arange(4), tokens]
    np.testing.assert_array_equal(ranks, 1 + (logits > own[:, None]).sum(1))
    order = np.argsort(-logits, axis=1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(top, order)
    np.testing.assert_allclose(top_logprobs, np.take_along_axis(expected, order, axis=1), rtol=1e-5)


def test_a_prompt_logprob_row_reports_its_target_and_draws_nothing():
    logits = random_logits(2)
    state = state_of([narrow(temperature=1.0, presence_penalty=1.0)])
    rows = rows_of(np.array([0, SLOTS]), targets=123)
    tokens, report = run(logits, state, rows)
    _, logprobs, ranks, top, _ = read_report(report)
    np.testing.assert_array_equal(tokens, [123, 123])
    np.testing.assert_allclose(logprobs[0], np.log(softmax(logits[0])[123]), rtol=1e-5)
    assert ranks[0] == 1 + (logits[0] > logits[0, 123]).sum()
    np.testing.assert_array_equal(top[0], np.argsort(-logits[0])[:MAX_LOGPROBS])
    after = record_tokens_jit(state, rows, tokens)
    assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(after)))


def test_nothing_is_reported_when_no_row_asks():
    # A padding row reads the last slot's memory, but not its wishes.
    state = state_of([Slot(), narrow(num_logprobs=3)], np.array([0, SLOTS - 1]))
    _, report = run(random_logits(2), state, rows_of(np.array([0, SLOTS])))
    assert not report[:, 1:].any()


def test_top_k_equals_lax_top_k_with_ties():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 40, size=(3, 128 * 20)) * (rng.random((3, 128 * 20)) < 0.02)
    x = x.astype(np.float32)  # blocks differ in their largest, and share what is below it
    for k in (1, 7, 19, 20, 100):
        expected = jax.lax.top_k(x, k)
        actual = vocab.top_k(vocab.to_blocks(jnp.asarray(x)), k)
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(one, other)


# State.


def test_recorded_tokens_count_as_outputs():
    slots = [
        narrow(presence_penalty=2.0),
        Slot(bad_words=((0, 1, 0),)),
        Slot({"min_tokens": 2}, stop_tokens=(1,)),
        Slot(),
    ]
    state, rows = state_of(slots), rows_of(np.array([0, 1, 2, 3, SLOTS]))
    logits = np.stack([RAMP] * 5)
    logits[2, 1] = 9  # the stop token, banned for two steps
    seen = []
    for step in range(3):
        logits[1] = RAMP if step != 1 else np.roll(RAMP, 1)
        tokens, _ = run(logits, state, rows)
        state = record_tokens_jit(state, rows, tokens)
        seen.append(tokens[:4])
    np.testing.assert_array_equal(np.transpose(seen), [[0, 1, 2], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(state.ints[:5, Int.NUM_OUTPUT], [3, 3, 3, 3, 0])
    np.testing.assert_array_equal(state.recent[0], [1, 2])
    assert state.output_counts[0].sum() == 3 and not state.output_counts[1:].any()


def test_admission_forgets_the_slot_s_former_history_and_no_other():
    slot = Slot({"presence_penalty": 1.0}, prompt=(5,), outputs=(6,))
    state = state_of([slot, slot, slot])
    rows = [pack_narrow(presence_penalty=1.0), pack_narrow(), pack_narrow(top_k=3)]
    floats, ints = (np.stack(column) for column in zip(*rows, strict=True))
    state = admit_narrow_jit(state, np.array([1, SLOTS, 0], np.int32), floats, ints)
    # Slot 0 has no penalties now: its stale counts may stay, unread.
    np.testing.assert_array_equal(state.output_counts[:3].sum(1), [1, 0, 1])
    np.testing.assert_array_equal(state.in_prompt[:3].sum(1), [1, 0, 1])
    np.testing.assert_array_equal(state.recent[:3], [[-1, -1], [-1, -1], [-1, 6]])
    np.testing.assert_array_equal(state.ints[:3, Int.TOP_K], [3, 0, 0])
    np.testing.assert_array_equal(state.ints[:3, Int.NUM_OUTPUT], [0, 0, 1])
    assert choose_of(state, 0) == 0


def choose_of(state: SamplingState, slot: int) -> int:
    return int(run(RAMP[None], state, rows_of(np.array([slot])))[0][0])


def test_stale_wide_values_of_a_former_request_are_not_read():
    former = Slot(
        {"min_tokens": 9, "presence_penalty": 2.0},
        bias={7: 50.0},
        allowed=(7,),
        grammar=(7,),
        bad_words=((0,),),
        stop_tokens=(0,),
        outputs=(0,),
    )
    state = state_of([former])
    assert choose_of(state, 0) == 7
    floats, ints = pack_narrow()
    state = admit_narrow_jit(state, np.array([0], np.int32), floats[None], ints[None])
    assert choose_of(state, 0) == 0


def test_a_donated_state_is_updated_in_place():
    num_slots, size, rows = 16, 50_000, 4

    def step(state, logits, slots, floats, ints, tokens, is_output):
        state = admit_narrow(state, slots, floats, ints)
        state = load_history(state, slots, tokens, is_output)
        chosen = SamplingRows(slots=slots, positions=tokens, targets=tokens - size)
        result, report = sample(logits, state, chosen, max_logprobs=2)
        return record_tokens(state, chosen, result), report

    state = init_sampling_state(num_slots, size, **SIZES)
    vector = jnp.zeros(rows, jnp.int32)
    floats, ints = (jnp.asarray(np.tile(row, (rows, 1))) for row in pack_narrow())
    arguments = (jnp.zeros((rows, size)), vector, floats, ints, vector, vector == 0)
    compiled = jax.jit(step, donate_argnums=0).lower(state, *arguments).compile()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= state_bytes
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line]
    assert not [line for line in copies if f"[{num_slots},{size}]" in line]


def test_a_vocabulary_split_over_devices_gives_the_same_tokens_without_gathering_it():
    size, rows = 128 * 160, rows_of(np.arange(SLOTS))
    options = {"temperature": 1.0, "top_k": 500, "top_p": 0.9, "typical_p": 0.9}
    floats, ints = pack_narrow(presence_penalty=1.0, num_logprobs=3, **options)
    state = admit_narrow_jit(
        init_sampling_state(SLOTS, size, **SIZES),
        np.arange(SLOTS, dtype=np.int32),
        np.tile(floats, (SLOTS, 1)),
        np.tile(ints, (SLOTS, 1)),
    )
    logits = random_logits(SLOTS, size)
    expected, _ = sample_jit(logits, state, rows, max_logprobs=MAX_LOGPROBS)

    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((None, "tensor"), (None,)))
    wide = ("output_counts", "in_prompt", "allowed", "grammar")
    placed = jax.device_put(state, whole).replace(
        **{name: jax.device_put(getattr(state, name), split) for name in wide}
    )
    arguments = (jax.device_put(logits, split), placed, jax.device_put(rows, whole))
    compiled = sample_jit.lower(*arguments, max_logprobs=MAX_LOGPROBS).compile()
    np.testing.assert_array_equal(compiled(*arguments)[0], expected)
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert gathers and not [line for line in gathers if f"{size}]" in line or "160,128]" in line]
