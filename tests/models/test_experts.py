"""Qwen3-MoE and Mixtral against numpy, and against Hugging Face transformers in float32."""

import jax
import numpy as np
import pytest

from jaxserve.errors import WeightError
from jaxserve.mesh import mesh_of_one
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.loading import abstract_model, dummy_params, load_params
from jaxserve.models.mixtral import MixtralConfig
from jaxserve.models.qwen3_moe import Qwen3MoeConfig
from jaxserve.ops.quantization import QuantizedWeight, dequantize
from tests.checkpoints import folder_tensors, write_shards
from tests.dense_families import DenseFamily
from tests.families import CONFIGS, write_family_folder, write_family_gguf
from tests.models.family_checks import (
    PROMPTS,
    assert_dense,
    assert_matters,
    assert_transformers_logits,
    assert_transformers_tokens,
)
from tests.models.forward import FLOAT32, logits_of
from tests.models.oracle import assert_close

READERS = {"qwen3_moe": Qwen3MoeConfig, "mixtral": MixtralConfig}
VARIANTS = {
    "qwen3-moe": ("qwen3_moe", {"tie_word_embeddings": False}),
    "qwen3-moe tied, weights as they are": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3-moe every other layer": (
        "qwen3_moe",
        {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3-moe sliding, biased": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 7, "attention_bias": True},
    ),
    "mixtral": ("mixtral", {}),
    "mixtral sliding": ("mixtral", {"sliding_window": 7, "num_local_experts": 8}),
}
GGUF = ["qwen3-moe", "mixtral"]


def folder_of(path, variant, **changes):
    family, own = VARIANTS[variant]
    return write_family_folder(path, family, seed=3, **{**own, **changes})


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_numpys(tmp_path, variant):
    assert_dense(folder_of(tmp_path, variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    assert_transformers_logits(folder_of(tmp_path, variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", GGUF)
def test_logits_of_a_gguf_equal_transformers(tmp_path, variant):
    folder = folder_of(tmp_path / "hf", variant)
    assert_transformers_logits(folder, write_family_gguf(tmp_path / "twin.gguf", folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "form"),
    [*((variant, "folder") for variant in VARIANTS), *((variant, "gguf") for variant in GGUF)],
)
def test_greedy_tokens_equal_transformers(tmp_path, variant, form):
    folder = folder_of(tmp_path / "hf", variant)
    twin = write_family_gguf(tmp_path / "twin.gguf", folder) if form == "gguf" else None
    assert_transformers_tokens(folder, tmp_path / "cache", twin)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("qwen3-moe", {"norm_topk_prob": False}),
        ("qwen3-moe", {"num_experts_per_tok": 2}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("mixtral", {"rms_norm_eps": 0.1}),
        ("mixtral sliding", {"sliding_window": None}),
    ],
)
def test_the_checks_see_a_field_that_changes_the_mathematics(tmp_path, variant, changes):
    first = folder_of(tmp_path / "1", variant)
    assert_matters(first, folder_of(tmp_path / "2", variant, **changes))


@pytest.mark.parametrize("variant", GGUF)
def test_a_gguf_holds_the_tensors_and_the_config_of_its_folder(tmp_path, variant):
    folder = folder_of(tmp_path / "hf", variant)
    twin = write_family_gguf(tmp_path / "x.gguf", folder)
    with open_checkpoint(twin) as checkpoint, open_checkpoint(folder) as original:
        assert set(checkpoint.names) == set(original.names)
        for name in original.names:
            np.testing.assert_array_equal(checkpoint.read(name), original.read(name))
        reader = READERS[VARIANTS[variant][0]]
        assert reader.from_hf(checkpoint.config) == reader.from_hf(original.config)


def test_a_stack_of_experts_is_read_by_slice(tmp_path):
    folder = folder_of(tmp_path, "mixtral")
    tensors = folder_tensors(folder)
    with open_checkpoint(folder) as checkpoint:
        name = "model.layers.1.mlp.experts.down_proj.weight"
        assert checkpoint.shape(name) == (4, 64, 128)
        part = checkpoint.read(name, (slice(1, 3), slice(None), slice(16, 32)))
    stored = [tensors[f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight"] for i in (1, 2)]
    np.testing.assert_array_equal(part, np.stack(stored)[:, :, 16:32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lost", r"gate_proj.weight: the checkpoint has 3 experts, .* expert 1 is missing"),
        (
            "last lost",
            r"gate_proj.weight has shape \(3, 128, 64\); config.json asks for \(4, 128, 6",
        ),
        (
            "short",
            r"experts.1.w1.weight has shape \(127, 64\); that of .*experts.0.w1.* \(128, 64\)",
        ),
        ("all lost", r"lacks the parameter model.layers.0.mlp.experts.gate_proj.weight"),
    ],
)
def test_experts_that_do_not_make_a_stack_are_refused(tmp_path, change, message):
    folder = folder_of(tmp_path, "mixtral")
    tensors = folder_tensors(folder)
    experts = [f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight" for i in range(4)]
    if change == "short":
        tensors[experts[1]] = tensors[experts[1]][:-1]
    for name in {"lost": experts[1:2], "last lost": experts[3:], "all lost": experts}.get(
        change, []
    ):
        del tensors[name]
    write_shards(folder, tensors, 1)
    with pytest.raises(WeightError, match=message):
        logits_of(folder, PROMPTS[0], chunks=(40,))


def values_of(folder, quantization):
    """Returns the parameters by name, quantised ones as such."""
    with open_checkpoint(folder) as checkpoint:
        model = abstract_model(
            checkpoint.config,
            mesh_of_one(),
            dtype=FLOAT32,
            activation_dtype=FLOAT32,
            quantization=quantization,
        )
        leaves = iter(load_params(model, checkpoint, lambda done, total: None))
        names = checkpoint.names
    values = {
        parameter.name: jax.tree.map(lambda _: next(leaves), parameter.value)
        for parameter in model.parameters
    }
    assert set(values) == set(names)
    dummies = dummy_params(model, 0)
    assert [(array.shape, array.dtype) for array in dummies] == [
        (shape.shape, shape.dtype) for shape in model.shapes
    ]
    return values


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_experts_are_quantised_as_other_matrices_are_and_routers_are_not(tmp_path, quantization):
    folder = folder_of(tmp_path / "a", "qwen3-moe every other layer", moe_intermediate_size=64)
    tensors, values = folder_tensors(folder), values_of(folder, quantization)
    bound = {"int8": 0.01, "int4": 0.15, "fp8": 0.05}[quantization]
    for name, value in values.items():
        if isinstance(value, QuantizedWeight):
            assert "proj" in name
            stacks = ".experts." in name
            dense = np.asarray((jax.vmap(dequantize) if stacks else dequantize)(value))
            for number, matrix in enumerate(dense if stacks else dense[None]):
                stored = name.replace(".experts.", f".experts.{number}.")
                error = np.linalg.norm(matrix - tensors[stored]) / np.linalg.norm(tensors[stored])
                assert 1e-4 < error < bound, stored
                tensors[stored] = matrix
        else:
            assert "proj" not in name
            rows = len(tensors[name])  # what follows them pads the vocabulary
            np.testing.assert_array_equal(value[:rows], tensors[name])
    twin = folder_of(tmp_path / "b", "qwen3-moe every other layer", moe_intermediate_size=64)
    write_shards(twin, tensors, 1)
    actual = logits_of(folder, PROMPTS[2], chunks=(5, 1), quantization=quantization)
    assert_close(actual, DenseFamily(twin).logits(PROMPTS[2]))


def test_experts_that_are_stored_quantised_are_refused(tmp_path):
    folder = folder_of(tmp_path, "mixtral", quantization_config={"quant_method": "fp8"})
    with pytest.raises(WeightError, match="experts that are stored quantised .* are not supported"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen3_moe", "hidden_act", "gelu"),
        ("qwen3_moe", "model_type", "qwen2_moe"),
        ("qwen3_moe", "shared_expert_intermediate_size", 128),
        ("qwen3_moe", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "mlp_only_layers", [2]),
        ("qwen3_moe", "num_experts_per_tok", 9),
        ("qwen3_moe", "num_experts", 0),
        ("qwen3_moe", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("mixtral", "hidden_act", "gelu"),
        ("mixtral", "model_type", "llama"),
        ("mixtral", "attention_bias", True),
        ("mixtral", "num_experts_per_tok", 0),
        ("mixtral", "num_local_experts", None),
    ],
)
def test_a_config_field_that_is_not_handled_is_refused(family, key, value):
    with pytest.raises(WeightError) as caught:
        READERS[family].from_hf({**CONFIGS[family], key: value})
    assert "config.json" in str(caught.value)
    assert any(word in str(caught.value) for word in (key, "rope scaling", "experts; there must"))


def test_defaults_are_those_of_transformers():
    config = {**CONFIGS["qwen3_moe"]}
    for key in ("head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps",
                "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"):  # fmt: skip
        del config[key]
    read = Qwen3MoeConfig.from_hf(config)
    assert (read.head_dim, read.max_positions, read.norm_eps) == (16, 32768, 1e-6)
    assert (read.rope.theta, read.is_renormalized, read.has_experts) == (1e4, False, (True, True))
    config = {**CONFIGS["mixtral"]}
    for key in ("max_position_embeddings", "rope_theta", "rms_norm_eps"):
        del config[key]
    read = MixtralConfig.from_hf(config)
    assert (read.rope.theta, read.norm_eps, read.max_positions) == (1e6, 1e-5, 131072)
