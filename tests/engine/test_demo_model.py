"""The engine on real weights, SmolLM2-135M-Instruct in float32, against transformers."""

import dataclasses

import numpy as np
import pytest
import tokenizers

from jaxserve.config import EngineConfig
from jaxserve.engine.core import CompileCounter, EngineCore
from jaxserve.engine.request import SamplingParams
from jaxserve.models.checkpoint import resolve, tokenizer_files
from tests.checkpoints import demo_as_hf_folder
from tests.driving import run, tokens_of
from tests.models.forward import logits_of

pytestmark = pytest.mark.slow

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write a haiku about rain.",
    "How do I boil an egg?",
    "Explain gravity to a child.",
    "What is 12 times 12?",
    "Translate 'good morning' to Spanish.",
    "Who wrote Hamlet?",
    "List the planets of the solar system.",
    "Give me a recipe for pancakes, step by step, with amounts.",
    "Why is the sky blue?",
    "def fibonacci(n):",
    "Summarise: The quick brown fox jumps over the lazy dog. The dog sleeps on.",
    "What should I pack for a week of hiking in the mountains in autumn?",
    "Tell me a joke.",
    "日本の首都はどこですか？",
    "Write an email to my boss asking for a day off next Friday.",
    "1, 1, 2, 3, 5, 8,",
    "What are the advantages and disadvantages of electric cars?",
    "Once upon a time",
)
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
CONFIG = EngineConfig(
    model="demo",
    dtype="float32",
    max_model_len=256,
    max_num_seqs=32,
    max_num_batched_tokens=256,
)


@pytest.fixture(scope="module")
def prompts():
    text = tokenizer_files(resolve("demo")).tokenizer_json
    tokenizer = tokenizers.Tokenizer.from_str(text)
    form = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [tokenizer.encode(form.format(question)).ids for question in QUESTIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_as_hf_folder(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def reference(folder):
    import torch  # not in the fast tier
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        yield lambda tokens: model(torch.tensor([tokens])).logits[0].numpy()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return dataclasses.replace(CONFIG, compile_cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def core(config):
    core = EngineCore(config, print)
    yield core
    core.close()


@pytest.fixture(scope="module")
def together(core, prompts):
    return tokens_of(run(core, prompts, GREEDY))


def test_greedy_tokens_equal_transformers(reference, prompts, together):
    # Each token is the reference's own choice after all before it: what greedy search would give.
    for prompt, tokens in zip(prompts, together, strict=True):
        logits = reference(prompt + tokens)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_greedy_tokens_alone_are_the_same(core, prompts, together):
    for prompt, tokens in list(zip(prompts, together, strict=True))[:6]:
        assert run(core, [prompt], GREEDY)[0].tokens == tokens


def test_greedy_tokens_in_a_batch_of_32_with_staggered_arrivals_are_the_same(
    core, prompts, together
):
    order = [*range(20), *range(12)]
    answers = run(core, [prompts[index] for index in order], GREEDY, arrive_every=2)
    assert tokens_of(answers) == [together[index] for index in order]
    for prompt, answer in zip(prompts, answers[20:], strict=False):
        assert answer.num_cached_tokens == (len(prompt) - 1) // 16 * 16


def test_chunks_of_16_and_preemption_do_not_change_tokens(config, prompts, together):
    # Pages for two sequences of full length, eight requests.
    small = dataclasses.replace(config, max_num_batched_tokens=16, max_num_seqs=8, num_pages=2 * 16)
    other = EngineCore(small, print)
    assert tokens_of(run(other, prompts[:8], GREEDY)) == together[:8]
    assert other.stats().num_preemptions > 0
    sampled = dataclasses.replace(
        GREEDY, temperature=0.8, top_p=0.95, seed=7, repetition_penalty=1.1
    )
    squeezed = tokens_of(run(other, prompts[:8], sampled))
    other.close()
    wide = EngineCore(dataclasses.replace(config, enable_prefix_caching=False), print)
    assert tokens_of(run(wide, prompts[:8], sampled)) == squeezed
    alone = [run(wide, [prompt], sampled)[0].tokens for prompt in prompts[:2]]
    assert alone == squeezed[:2]
    wide.close()


def test_logits_are_within_1e_4_of_transformers(folder, reference, prompts):
    tokens = prompts[9] + prompts[13]
    expected = reference(tokens)
    actual = logits_of(folder, tokens, chunks=(len(tokens) - 9, 1, 8))
    assert (np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)).max() < 1e-4


def test_nothing_compiles_while_serving(core, prompts):
    counter = CompileCounter()
    run(core, prompts, dataclasses.replace(GREEDY, temperature=1.0, top_k=40, max_tokens=8))
    counter.close()
    assert counter.count == 0
