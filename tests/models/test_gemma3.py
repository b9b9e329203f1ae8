"""Gemma 3 against numpy, and against Hugging Face transformers in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.batch import Batch
from jaxserve.errors import WeightError
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.gemma3 import Gemma3, Gemma3Config
from jaxserve.ops.rope import LinearScaling
from tests.families import CONFIGS, family_tensors, write_family_folder, write_family_gguf
from tests.models.family_checks import (
    assert_dense,
    assert_matters,
    assert_transformers_logits,
    assert_transformers_tokens,
)

LINEAR = {"rope_type": "linear", "factor": 8.0}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
NESTED = {
    "rope_theta": ...,
    "rope_local_base_freq": ...,
    "rope_scaling": ...,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 90000.0},
    },
}
SHORT = {"sliding_window_pattern": 2, "num_hidden_layers": 3}
CAPPED = {"attn_logit_softcapping": 0.5}
VARIANTS = {
    "plain": {},
    "linear rope": {"rope_scaling": LINEAR},
    "nested rope": {**SHORT, **NESTED},
    "layer types": {"layer_types": MIXED, "num_hidden_layers": 3, "final_logit_softcapping": 2.0},
    "biased": {
        **SHORT,
        "attention_bias": True,
        "query_pre_attn_scalar": 168,
        "tie_word_embeddings": False,
    },
}


def folder_of(path, variant):
    return write_family_folder(path, "gemma3", seed=3, **VARIANTS[variant])


# transformers reads attn_logit_softcapping and then leaves it out, so numpy alone has it.
@pytest.mark.parametrize(
    "changes",
    [
        {**SHORT, **CAPPED, "final_logit_softcapping": 2.0, "rope_scaling": LINEAR},
        VARIANTS["biased"],
    ],
    ids=["capped", "biased"],
)
def test_logits_equal_dense_attention(tmp_path, changes):
    assert_dense(write_family_folder(tmp_path, "gemma3", seed=3, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    assert_transformers_logits(folder_of(tmp_path, variant))


@pytest.mark.slow
def test_logits_of_a_gguf_equal_transformers(tmp_path):
    folder = folder_of(tmp_path / "hf", "linear rope")
    assert_transformers_logits(folder, write_family_gguf(tmp_path / "twin.gguf", folder))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_greedy_tokens_equal_transformers(tmp_path, form):
    folder = folder_of(tmp_path / "hf", "linear rope")
    twin = write_family_gguf(tmp_path / "twin.gguf", folder) if form == "gguf" else None
    assert_transformers_tokens(folder, tmp_path / "cache", twin)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 9},
        {"sliding_window_pattern": 3},
        {"rope_local_base_freq": 500.0},
        {"rope_theta": 10000.0},
        {"rope_scaling": LINEAR},
        {"query_pre_attn_scalar": 168},
        {"final_logit_softcapping": 2.0},
        CAPPED,
    ],
)
def test_the_checks_see_a_field_that_changes_the_mathematics(tmp_path, changes):
    plain = write_family_folder(tmp_path / "plain", "gemma3", seed=3)
    assert_matters(plain, write_family_folder(tmp_path / "other", "gemma3", seed=3, **changes))


def test_a_gguf_holds_the_tensors_and_the_config_of_its_folder(tmp_path):
    folder = folder_of(tmp_path / "hf", "linear rope")
    expected = family_tensors({**CONFIGS["gemma3"], **VARIANTS["linear rope"]}, seed=3)
    with open_checkpoint(write_family_gguf(tmp_path / "x.gguf", folder)) as checkpoint:
        assert set(checkpoint.names) == set(expected)
        for name, value in expected.items():
            # Raised by 1 and lowered again, in float32.
            np.testing.assert_allclose(checkpoint.read(name), value, atol=2**-23, rtol=0)
        with open_checkpoint(folder) as original:
            assert Gemma3Config.from_hf(checkpoint.config) == Gemma3Config.from_hf(original.config)


def test_the_27b_gguf_scales_queries_by_their_share_of_the_hidden_size(tmp_path):
    sizes = {"num_hidden_layers": 62, "hidden_size": 96, "vocab_size": 320}
    folder = write_family_folder(tmp_path / "hf", "gemma3", **sizes)
    with open_checkpoint(write_family_gguf(tmp_path / "x.gguf", folder)) as checkpoint:
        assert checkpoint.config["query_pre_attn_scalar"] == 96 // 4
        assert checkpoint.config["head_dim"] == 32


def test_windows_and_ropes_follow_the_layers():
    config = Gemma3Config.from_hf({**CONFIGS["gemma3"], "rope_scaling": LINEAR})
    assert config.windows == (7, 7, 7, 7, 7, None, 7)
    assert (config.local_rope.theta, config.global_rope.theta) == (1e4, 1e6)
    assert config.global_rope.scaling == LinearScaling(factor=8.0)


@pytest.mark.parametrize(("dtype", "root"), [("bfloat16", 55.5), ("float32", 3072**0.5)])
def test_embeddings_are_scaled_by_the_root_rounded_as_activations_are(dtype, root):
    sizes = {"num_hidden_layers": 0, "hidden_size": 3072}
    config = Gemma3Config.from_hf({**CONFIGS["gemma3"], **sizes})
    dtype = jnp.dtype(dtype)
    model = Gemma3(config, dtype=dtype, activation_dtype=dtype)
    model.model.embed_tokens.weight[...] = jnp.ones((320, 3072), dtype)
    tokens = jnp.zeros((3,), jnp.int32)
    batch = Batch(
        tokens=tokens,
        positions=tokens,
        kv_lens=tokens,
        page_table=tokens[:, None],
        cu_q_lens=jnp.zeros((4,), jnp.int32),
        counts=jnp.zeros((2,), jnp.int32),
        attention="reference",
        experts="reference",
    )
    hidden, _ = model(batch, ())
    np.testing.assert_array_equal(np.asarray(hidden, np.float32), np.float32(root))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_activation", "gelu"),
        ("use_bidirectional_attention", True),
        ("mlp_bias", True),
        ("rope_frequency_factors", [1.0, 2.0]),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_theta": 10000.0}),
        ("sliding_window", None),
        ("sliding_window", 0),
        ("layer_types", ["chunked_attention"] * 7),
        ("layer_types", ["full_attention"]),
    ],
)
def test_a_config_field_that_changes_the_mathematics_is_refused(key, value):
    with pytest.raises(WeightError) as caught:
        Gemma3Config.from_hf({**CONFIGS["gemma3"], key: value})
    assert "config.json" in str(caught.value)
    assert any(word in str(caught.value) for word in (key, "rope scaling 'yarn'"))
