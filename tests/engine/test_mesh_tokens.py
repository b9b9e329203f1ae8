"""One engine on eight CPU devices: every mesh gives the tokens of one device."""

import dataclasses
import re

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.grammar import GrammarCompiler
from jaxserve.engine.request import SamplingParams
from jaxserve.errors import ConfigError
from jaxserve.models.checkpoint import tokenizer_files
from jaxserve.structured_outputs import Grammar
from jaxserve.text.grammar import vocabulary_of
from jaxserve.text.tokenizer import Tokenizer
from tests.checkpoints import write_llama_folder
from tests.driving import run, tokens_of
from tests.families import write_family_folder

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # of log-probabilities: sums over devices are rounded in another order
CONFIG = EngineConfig(
    dtype="float32",
    max_num_seqs=4,
    max_num_batched_tokens=32,
    max_model_len=96,
    page_size=4,
    num_pages=26,  # of each rank: two sequences do not fit at their full length
)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
OPTIONS = (
    dataclasses.replace(GREEDY, logprobs=5),
    dataclasses.replace(GREEDY, prompt_logprobs=2, repetition_penalty=1.3),
    dataclasses.replace(GREEDY, frequency_penalty=0.7, presence_penalty=0.4),
    dataclasses.replace(SAMPLED, seed=1, top_p=0.9),
    dataclasses.replace(SAMPLED, seed=2, top_k=40, logprobs=0, logprob_token_ids=(3, 200, 9)),
    dataclasses.replace(SAMPLED, seed=3, top_k=100, top_p=0.97),  # more than the candidates
    dataclasses.replace(SAMPLED, seed=4, typical_p=0.6),
    dataclasses.replace(SAMPLED, seed=5, min_p=0.05, repetition_penalty=1.2),
    dataclasses.replace(SAMPLED, seed=6, logit_bias={7: 4.0, 300: 3.0}),
    dataclasses.replace(SAMPLED, seed=7, allowed_token_ids=(5, 120, 130, 255, 319)),
    dataclasses.replace(SAMPLED, seed=8, bad_word_tokens=((9,), (5, 6))),
    dataclasses.replace(
        SAMPLED, seed=9, ignore_eos=False, stop_token_ids=(3, 140), min_tokens=6, logprobs=3
    ),
    dataclasses.replace(
        SAMPLED, seed=10, prompt_logprobs=0, grammar=Grammar(source="start: /[a-f]+[0-9]{3,90}/")
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Vocabulary and KV heads divide by no mesh here: one is padded, the others are copied.
    path = tmp_path_factory.mktemp("llama")
    return write_llama_folder(path, seed=1, heads=8, kv_heads=4, head_dim=8, tied=False)


def workload(folder, **options):
    """Runs requests with every option twice; returns the answers and what they took."""
    random = np.random.default_rng(0)
    shared = random.integers(3, 300, 13).tolist()
    prompts = [
        shared * (index % 3 == 0) + random.integers(3, 300, random.integers(3, 30)).tolist()
        for index in range(24)
    ]
    core = EngineCore(dataclasses.replace(CONFIG, model=str(folder), **options), print)
    tokenizer = Tokenizer.from_files(tokenizer_files(folder))
    compiler = GrammarCompiler(
        vocabulary_of(tokenizer), vocab_size=core.vocab_size, eos_tokens=core.info.eos_tokens
    )
    try:
        params = [OPTIONS[index % len(OPTIONS)] for index in range(24)]
        first = run(core, prompts, params, compiler=compiler)
        second = run(core, prompts, params, arrive_every=2, compiler=compiler)
        kept = tokenizer.decode(first[len(OPTIONS) - 1].tokens)
        assert re.fullmatch("[a-f]+[0-9]*", kept), kept
        return [*first, *second], core.stats()
    finally:
        core.close()
        compiler.close()


@pytest.fixture(scope="module")
def expected(folder):
    answers, _ = workload(folder, mesh="1")
    return answers


def assert_same(answers, expected):
    assert tokens_of(answers) == tokens_of(expected)
    for answer, other in zip(answers, expected, strict=True):
        for ours, theirs in (
            (answer.logprobs, other.logprobs),
            ((answer.prompt_logprobs or ())[1:], (other.prompt_logprobs or ())[1:]),
        ):
            for one, two in zip(ours, theirs, strict=True):
                assert one.logprob == pytest.approx(two.logprob, abs=TOLERANCE)
                assert one.rank == two.rank
                assert [token for token, _ in one.top] == [token for token, _ in two.top]
                values = [[logprob for _, logprob in side.top] for side in (one, two)]
                assert values[0] == pytest.approx(values[1], abs=TOLERANCE)


@pytest.mark.parametrize("mesh", ["2x4", "8x1", "1x8"])
def test_a_mesh_gives_the_tokens_of_one_device(folder, expected, mesh):
    answers, stats = workload(folder, mesh=mesh)
    assert_same(answers, expected)
    assert stats.num_preemptions > 0 and stats.prefix_hits > 0
    assert stats.num_compiles_since_ready == 0


def test_experts_on_a_mesh_give_the_tokens_of_one_device(tmp_path):
    widths = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 8}
    folder = write_family_folder(tmp_path, "qwen3_moe", **widths)
    expected, _ = workload(folder, mesh="1")
    for mesh in ("2x2x2", "expert=8"):  # more experts' groups than KV heads, and fewer
        answers, stats = workload(folder, mesh=mesh)
        assert_same(answers, expected)
        assert stats.num_compiles_since_ready == 0


@pytest.mark.parametrize(
    ("quantization", "kv_cache_dtype", "tolerance"),
    [("int4", "auto", TOLERANCE), ("int8", "int8", 0.05)],
)
def test_quantised_weights_and_caches_on_a_mesh(folder, quantization, kv_cache_dtype, tolerance):
    prompt = np.random.default_rng(1).integers(3, 300, 60).tolist()
    params = dataclasses.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    logprobs = []
    for mesh in ("1", "2x2"):
        config = dataclasses.replace(
            CONFIG,
            model=str(folder),
            mesh=mesh,
            max_num_seqs=2,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
        )
        core = EngineCore(config, print)
        (answer,) = run(core, [prompt], params)
        core.close()
        logprobs.append([one.logprob for one in answer.prompt_logprobs[1:]])
    # What is rounded to 8 bits may fall to the other side of a step.
    assert logprobs[0] == pytest.approx(logprobs[1], abs=tolerance)


def test_a_mesh_that_does_not_divide_the_model_is_refused_before_weights_are_read():
    config = dataclasses.replace(CONFIG, model="demo", mesh="2x4", num_pages="auto")
    with pytest.raises(ConfigError, match="tensor=4 does not divide its 9 heads"):
        EngineCore(config, print)
