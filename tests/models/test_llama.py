"""The Llama family against Hugging Face transformers, in float32."""

import json

import numpy as np
import pytest

from jaxserve.errors import WeightError
from jaxserve.models.llama import LlamaConfig
from jaxserve.models.registry import family_for
from tests.checkpoints import write_llama_folder, write_llama_gguf
from tests.dense_llama import DenseLlama
from tests.models.forward import logits_of

TOKENS = np.random.default_rng(0).integers(3, 300, 40).tolist()
WHOLE, CHUNKED = (40,), (9, 1, 16, 1, 1, 12)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "one kv head": {"kv_heads": 1},
    "as many kv heads": {"kv_heads": 4},
    "wide heads": {"head_dim": 32},
}


def transformers_logits(folder, tokens):
    import torch  # not in the fast tier
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def test_logits_equal_dense_attention(tmp_path):
    folder = write_llama_folder(tmp_path, seed=3, tied=False)
    assert_close(logits_of(folder, TOKENS, chunks=CHUNKED), DenseLlama(folder).logits(TOKENS))


def assert_close(actual, expected):
    error = np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)
    assert error.max() < 1e-4, error


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [WHOLE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant, chunks):
    folder = write_llama_folder(tmp_path, seed=3, **VARIANTS[variant])
    assert_close(logits_of(folder, TOKENS, chunks=chunks), transformers_logits(folder, TOKENS))


@pytest.mark.slow
def test_mistral_logits_with_a_sliding_window_equal_transformers(tmp_path):
    folder = write_llama_folder(tmp_path, seed=4)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config |= {"sliding_window": 7}
    (folder / "config.json").write_text(json.dumps(config))
    expected = transformers_logits(folder, TOKENS)
    assert_close(logits_of(folder, TOKENS, chunks=CHUNKED), expected)
    without = write_llama_folder(tmp_path / "full", seed=4)
    assert np.abs(logits_of(without, TOKENS, chunks=CHUNKED) - expected).max() > 1e-2


@pytest.mark.parametrize("variant", ["tied", "untied", "llama3 rope", "linear rope"])
def test_the_gguf_twin_gives_the_same_logits(tmp_path, variant):
    folder = write_llama_folder(tmp_path / "hf", seed=5, **VARIANTS[variant])
    gguf = write_llama_gguf(tmp_path / "twin.gguf", folder, kind="F32")
    actual = logits_of(gguf, TOKENS, chunks=WHOLE)
    assert_close(actual, logits_of(folder, TOKENS, chunks=WHOLE))


@pytest.mark.slow
def test_bfloat16_checkpoints_are_read_exactly(tmp_path):
    folder = write_llama_folder(tmp_path, seed=6, dtype="bfloat16")
    assert_close(logits_of(folder, TOKENS, chunks=WHOLE), transformers_logits(folder, TOKENS))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
    ],
)
def test_a_config_field_that_changes_the_mathematics_is_refused(tmp_path, key, value):
    folder = write_llama_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    config.pop("rope_parameters", None)
    with pytest.raises(WeightError, match="not supported"):
        LlamaConfig.from_hf(config)


def test_an_unknown_architecture_names_the_supported_ones():
    with pytest.raises(WeightError, match="LlamaForCausalLM"):
        family_for({"architectures": ["LlamaForCausalLN"]})


def edit_tensors(folder, change):
    """Rewrites the folder's tensors as one shard after `change(tensors)`."""
    from tests.checkpoints import folder_tensors, write_shards

    tensors = folder_tensors(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    change(tensors)
    write_shards(folder, tensors, 1)


def test_missing_unused_and_misshapen_tensors_are_named(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    cases = {
        "lacks the parameter": lambda tensors: tensors.pop(name),
        "does not use": lambda tensors: tensors.update({f"{name}_extra": tensors[name]}),
        "has shape": lambda tensors: tensors.update({name: tensors[name][:-1].copy()}),
    }
    for index, (message, change) in enumerate(cases.items()):
        folder = write_llama_folder(tmp_path / str(index))
        edit_tensors(folder, change)
        with pytest.raises(WeightError, match=message) as caught:
            logits_of(folder, TOKENS, chunks=WHOLE)
        assert name in str(caught.value)
