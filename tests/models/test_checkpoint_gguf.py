"""GGUF files read as Hugging Face checkpoints."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint import open_checkpoint, resolve
from tests.checkpoints import (
    finish_gguf,
    folder_tensors,
    llama3_factors,
    write_llama_folder,
    write_llama_gguf,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLICES = [
    (slice(None), slice(None)),
    (slice(0, 8), slice(None)),
    (slice(3, 29), slice(None)),
    (slice(None), slice(32, 64)),
    (slice(5, 6), slice(7, 41)),
    (slice(4, 4), slice(None)),
]


def write_one_tensor(path: Path, values: np.ndarray, **options: Any) -> Path:
    """Writes a small llama GGUF whose embedding is `values`; options override metadata."""
    writer = gguf.GGUFWriter(path, options.pop("architecture", "llama"))
    metadata = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 64,
        "attention.head_count": 2,
    } | options.pop("metadata", {})
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(f"{writer.arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{writer.arch}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in options.pop("texts", {}).items():
        writer.add_string(key, value)
    kind = options.pop("kind", None)
    writer.add_tensor(options.pop("name", "token_embd.weight"), values, raw_dtype=kind)
    assert not options
    finish_gguf(writer)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied float32 Llama with llama3 rope scaling."""
    path = tmp_path_factory.mktemp("llama")
    return write_llama_folder(path, seed=1, tied=False, rope_scaling=LLAMA3, rope_theta=500000.0)


@pytest.fixture(scope="module")
def twins(folder: Path) -> dict[str, Path]:
    """Its GGUF twins by type."""
    return {
        "F32": write_llama_gguf(folder / "f32.gguf", folder),
        "Q8_0": write_llama_gguf(folder / "q8.gguf", folder, kind="Q8_0"),
    }


def test_a_float32_twin_holds_exactly_the_tensors_of_its_folder(folder, twins):
    expected = folder_tensors(folder)
    with open_checkpoint(twins["F32"]) as checkpoint:
        assert set(checkpoint.names) == set(expected)
        for name, value in expected.items():
            assert checkpoint.shape(name) == value.shape
            np.testing.assert_array_equal(checkpoint.read(name), value)


def test_a_q8_twin_is_within_half_a_quantisation_step_of_its_folder(folder, twins):
    expected = folder_tensors(folder)
    with open_checkpoint(twins["Q8_0"]) as checkpoint:
        for name, value in expected.items():
            actual = checkpoint.read(name)
            assert actual.dtype == np.float32
            groups = np.abs(value).reshape(-1, 32).max(axis=1)
            # Half a step, and the scale's own rounding to float16.
            allowed = np.repeat(groups * (0.5 / 127 + 2**-10), 32).reshape(value.shape)
            assert (np.abs(actual - value) <= allowed).all()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("index", SLICES)
def test_a_slice_equals_the_same_part_of_the_whole(twins, kind, index):
    with open_checkpoint(twins[kind]) as checkpoint:
        for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
            name = f"model.layers.1.{part}.weight"
            whole = checkpoint.read(name)
            np.testing.assert_array_equal(checkpoint.read(name, index), whole[index])


def test_a_twin_has_the_config_of_its_folder(folder, twins):
    with open_checkpoint(folder) as original, open_checkpoint(twins["F32"]) as twin:
        differing = {key for key, value in original.config.items() if twin.config.get(key) != value}
        # llama3 scaling arrives as factors; <|endoftext|> also ends, as in llama.cpp.
        assert differing == {"rope_scaling", "eos_token_id"}
        assert twin.config["eos_token_id"] == [2, 0]
        assert twin.config["rope_frequency_factors"] == llama3_factors(original.config).tolist()
        assert twin.generation_config["pad_token_id"] == 2


def test_linear_rope_scaling_survives_the_conversion(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0}
    folder = write_llama_folder(tmp_path, rope_scaling=scaling)
    with open_checkpoint(write_llama_gguf(tmp_path / "x.gguf", folder)) as checkpoint:
        assert checkpoint.config["rope_scaling"] == scaling
        assert checkpoint.config["tie_word_embeddings"] is True


def test_a_head_size_unlike_hidden_over_heads_is_read(tmp_path):
    folder = write_llama_folder(tmp_path, head_dim=32)
    with open_checkpoint(write_llama_gguf(tmp_path / "x.gguf", folder)) as checkpoint:
        assert checkpoint.config["head_dim"] == 32
        name = "model.layers.0.self_attn.k_proj.weight"
        np.testing.assert_array_equal(checkpoint.read(name), folder_tensors(folder)[name])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_type_gguf_can_write_reads_back_as_its_own_dequantisation(tmp_path, kind):
    values = np.random.default_rng(0).standard_normal((48, 64), np.float32)
    kind = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(values, kind)
    path = write_one_tensor(tmp_path / "x.gguf", packed, kind=kind)
    expected = gguf.quants.dequantize(packed, kind)
    with open_checkpoint(path) as checkpoint:
        actual = checkpoint.read("model.embed_tokens.weight")
        np.testing.assert_array_equal(actual.astype(np.float32), expected)
        part = checkpoint.read("model.embed_tokens.weight", (slice(2, 9), slice(30, 50)))
        np.testing.assert_array_equal(part.astype(np.float32), expected[2:9, 30:50])


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0"])
def test_types_of_256_element_blocks_are_read_by_slice(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Small bytes, so that no scale is infinite or NaN.
    packed = np.random.default_rng(0).integers(0, 60, (8, 2 * block_bytes), np.uint8)
    metadata = {"embedding_length": 512}
    path = write_one_tensor(tmp_path / "x.gguf", packed, kind=kind, metadata=metadata)
    expected = gguf.quants.dequantize(packed, kind)
    with open_checkpoint(path) as checkpoint:
        name = "model.embed_tokens.weight"
        np.testing.assert_array_equal(checkpoint.read(name), expected)
        part = checkpoint.read(name, (slice(1, 3), slice(200, 300)))
        np.testing.assert_array_equal(part, expected[1:3, 200:300])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba' without experts is not"),
        ({"name": "blk.0.ssm_a.weight"}, "'blk.0.ssm_a.weight' has no place in a llama model"),
        ({"architecture": "qwen2", "metadata": {"expert_count": 8}}, "'qwen2' with experts is not"),
        ({"architecture": "qwen3moe"}, "'qwen3moe' without experts is not supported"),
        ({"metadata": {"block_count": None}}, "'llama.block_count' must be a positive number"),
        ({"metadata": {"attention.head_count_kv": [1, 2]}}, "differs between layers"),
        ({"metadata": {"rope.dimension_count": 8}}, "partial rotation"),
        ({"texts": {"llama.rope.scaling.type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"name": "output.weight"}, "'token_embd.weight' is missing"),
        ({"kind": gguf.GGMLQuantizationType.I32}, "type I32 cannot be read"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, options, message):
    values = np.ones((4, 64), np.int32 if "kind" in options else np.float32)
    path = write_one_tensor(tmp_path / "x.gguf", values, **options)
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_demo_model_has_the_published_shape():
    with open_checkpoint(resolve("demo")) as checkpoint:
        config = checkpoint.config
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert [config[key] for key in ("num_hidden_layers", "hidden_size")] == [30, 576]
        assert [config[key] for key in ("num_attention_heads", "num_key_value_heads")] == [9, 3]
        assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 1e5)
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 0])
        assert config["tie_word_embeddings"] is True
        sizes = [np.prod(checkpoint.shape(name)) for name in checkpoint.names]
        assert sum(sizes) == 134_515_008


def test_reading_the_demo_model_holds_little_more_than_its_largest_tensor():
    with open_checkpoint(resolve("demo")) as checkpoint:
        tracemalloc.start()
        for name in checkpoint.names[:12]:
            checkpoint.read(name)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    stored, values = 49152 * 612, 49152 * 576 * 4  # the embedding's bytes, as Q8_0 and float32
    assert peak < stored + values + 2**25
