"""Qwen2 and Qwen3 against numpy, and against Hugging Face transformers in float32."""

import numpy as np
import pytest

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.qwen import QwenConfig
from tests.families import CONFIGS, write_family_folder, write_family_gguf
from tests.models.family_checks import (
    assert_dense,
    assert_matters,
    assert_transformers_logits,
    assert_transformers_tokens,
)

SLIDING = {"use_sliding_window": True, "sliding_window": 7}
MIXED = ["sliding_attention", "full_attention"]
LINEAR = {"rope_type": "linear", "factor": 4.0}
VARIANTS = {
    "qwen2 tied": ("qwen2", {}),
    "qwen2 sliding": ("qwen2", {**SLIDING, "tie_word_embeddings": False}),
    "qwen2 layer types": ("qwen2", {**SLIDING, "layer_types": MIXED}),
    "qwen3 tied": ("qwen3", {"rope_scaling": LINEAR}),
    "qwen3 biased": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "qwen3 sliding": ("qwen3", SLIDING),
}


def folder_of(path, variant):
    family, changes = VARIANTS[variant]
    return write_family_folder(path, family, seed=3, **changes)


@pytest.mark.parametrize("variant", ["qwen2 sliding", "qwen3 biased"])
def test_logits_equal_dense_attention(tmp_path, variant):
    assert_dense(folder_of(tmp_path, variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    assert_transformers_logits(folder_of(tmp_path, variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen2 tied", "qwen3 tied"])
def test_logits_of_a_gguf_equal_transformers(tmp_path, variant):
    folder = folder_of(tmp_path / "hf", variant)
    assert_transformers_logits(folder, write_family_gguf(tmp_path / "twin.gguf", folder))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen2 tied", "qwen3 tied"])
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_greedy_tokens_equal_transformers(tmp_path, variant, form):
    folder = folder_of(tmp_path / "hf", variant)
    twin = write_family_gguf(tmp_path / "twin.gguf", folder) if form == "gguf" else None
    assert_transformers_tokens(folder, tmp_path / "cache", twin)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("qwen2 sliding", {"use_sliding_window": False}),
        ("qwen3 tied", {"rope_theta": 10000.0}),
        ("qwen3 tied", {"rope_scaling": None}),
        ("qwen3 tied", {"rms_norm_eps": 0.1}),
    ],
)
def test_the_checks_see_a_field_that_changes_the_mathematics(tmp_path, variant, changes):
    family, own = VARIANTS[variant]
    first = write_family_folder(tmp_path / "1", family, seed=3, **own)
    assert_matters(first, write_family_folder(tmp_path / "2", family, seed=3, **{**own, **changes}))


@pytest.mark.parametrize("variant", ["qwen2 tied", "qwen3 tied", "qwen3 biased"])
def test_a_gguf_holds_the_tensors_and_the_config_of_its_folder(tmp_path, variant):
    folder = folder_of(tmp_path / "hf", variant)
    twin = write_family_gguf(tmp_path / "x.gguf", folder)
    with open_checkpoint(twin) as checkpoint, open_checkpoint(folder) as original:
        assert set(checkpoint.names) == set(original.names)
        for name in original.names:
            np.testing.assert_array_equal(checkpoint.read(name), original.read(name))
        assert QwenConfig.from_hf(checkpoint.config) == QwenConfig.from_hf(original.config)


def test_rope_is_read_as_transformers_5_writes_it():
    old = CONFIGS["qwen2"]
    new = {key: value for key, value in old.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": old["rope_theta"]}
    assert QwenConfig.from_hf(new) == QwenConfig.from_hf(old)


def test_defaults_are_those_of_transformers():
    config = {**CONFIGS["qwen3"]}
    for key in ("head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps"):
        del config[key]
    read = QwenConfig.from_hf(config)
    assert (read.head_dim, read.max_positions, read.norm_eps) == (128, 32768, 1e-6)
    assert read.rope.theta == 10000.0


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("is_causal", False),
        ("use_mrope", True),
        ("model_type", "qwen2_moe"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "default", "mrope_section": [16, 24, 24]}),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["full_attention", "chunked_attention"]),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_a_config_field_that_changes_the_mathematics_is_refused(family, key, value):
    with pytest.raises(WeightError) as caught:
        QwenConfig.from_hf({**CONFIGS[family], key: value})
    assert "config.json" in str(caught.value)
    assert any(
        word in str(caught.value) for word in (key, "rope scaling", "mrope", "sliding_window")
    )


def test_qwen2_without_its_bias_is_refused():
    with pytest.raises(WeightError, match="attention_bias = False"):
        QwenConfig.from_hf({**CONFIGS["qwen2"], "attention_bias": False})
