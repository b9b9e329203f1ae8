"""Hugging Face folders of safetensors."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint import open_checkpoint, tokenizer_files
from tests.checkpoints import folder_tensors, write_json, write_llama_folder

SLICES = [
    (slice(0, 20), slice(None)),
    (slice(None), slice(16, 32)),
    (slice(3, 4), slice(None, 5)),
    (slice(8, 8), slice(0, 4)),
]


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Writes a folder with an empty config and one file of tensors."""
    write_json(folder / "config.json", {})
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_reads_as_the_safetensors_library_reads_it(tmp_path, dtype, shards):
    folder = write_llama_folder(tmp_path, seed=3, dtype=dtype, shards=shards)
    expected = folder_tensors(folder)
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.names) == set(expected)
        for name, value in expected.items():
            actual = checkpoint.read(name)
            assert (actual.dtype, checkpoint.shape(name)) == (value.dtype, value.shape)
            np.testing.assert_array_equal(actual, value)


@pytest.mark.parametrize("index", SLICES)
def test_a_slice_equals_the_same_part_of_the_whole(tmp_path, index):
    folder = write_llama_folder(tmp_path, dtype="bfloat16")
    with open_checkpoint(folder) as checkpoint:
        name = "model.layers.0.mlp.gate_proj.weight"
        np.testing.assert_array_equal(
            checkpoint.read(name, index), folder_tensors(folder)[name][index]
        )


@pytest.mark.parametrize(
    "dtype",
    [
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        np.float64,
        np.int64,
        np.int8,
        np.uint8,
        np.bool_,
    ],
)
def test_every_stored_type_comes_back_as_stored(tmp_path, dtype):
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    with open_checkpoint(write_tensors(tmp_path, {"x": values})) as checkpoint:
        actual = checkpoint.read("x")
        assert actual.dtype == values.dtype
        np.testing.assert_array_equal(actual, values)
        index = (slice(1, 2), slice(0, 2), slice(1, 4))
        np.testing.assert_array_equal(checkpoint.read("x", index), values[index])


def test_scalars_and_empty_tensors_are_read(tmp_path):
    tensors = {"scalar": np.array(7.5, np.float32), "empty": np.zeros((0, 4), np.float32)}
    with open_checkpoint(write_tensors(tmp_path, tensors)) as checkpoint:
        assert checkpoint.read("scalar") == np.float32(7.5)
        assert checkpoint.read("empty").shape == (0, 4)


def test_a_slice_needs_memory_for_itself_only(tmp_path):
    values = np.zeros((4096, 1024), np.float32)
    with open_checkpoint(write_tensors(tmp_path, {"x": values})) as checkpoint:
        for index in [(slice(64, 128), slice(None)), (slice(None), slice(0, 16))]:
            tracemalloc.start()
            part = checkpoint.read("x", index)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < part.nbytes + 2**20


def test_an_unknown_name_is_an_error(tmp_path):
    with open_checkpoint(write_llama_folder(tmp_path)) as checkpoint:
        with pytest.raises(WeightError, match="has no tensor 'x'"):
            checkpoint.read("x")


def test_generation_config_is_optional(tmp_path):
    folder = write_llama_folder(tmp_path)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.generation_config["eos_token_id"] == 2
    (folder / "generation_config.json").unlink()
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.generation_config == {}


def test_a_folder_is_the_same_bytes_for_the_same_seed(tmp_path):
    one, two = (write_llama_folder(tmp_path / name, seed=5) for name in ("one", "two"))
    other = write_llama_folder(tmp_path / "other", seed=6)
    names = sorted(file.name for file in one.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert any((one / name).read_bytes() != (other / name).read_bytes() for name in names)


def test_the_chat_template_comes_from_the_newest_place(tmp_path):
    folder = write_llama_folder(tmp_path)
    assert "<|im_start|>" in tokenizer_files(folder).chat_template
    write_json(folder / "chat_template.json", {"chat_template": "from json"})
    assert tokenizer_files(folder).chat_template == "from json"
    (folder / "chat_template.jinja").write_text("from jinja")
    assert tokenizer_files(folder).chat_template == "from jinja"


def test_of_named_chat_templates_the_default_is_taken(tmp_path):
    folder = write_llama_folder(tmp_path)
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert tokenizer_files(folder).chat_template == "d"


def test_special_tokens_may_be_objects_and_limits_absent(tmp_path):
    folder = write_llama_folder(tmp_path)
    config = {
        "eos_token": {"content": "</s>", "special": True},
        "add_bos_token": True,
        "model_max_length": 1e30,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "<x>"})
    files = tokenizer_files(folder)
    assert (files.bos_token, files.eos_token, files.add_bos_token) == ("<s>", "</s>", True)
    assert (files.pad_token, files.model_max_length) == (None, None)


def test_a_folder_without_tokenizer_json_is_an_error(tmp_path):
    (write_llama_folder(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(WeightError, match=r"has no tokenizer\.json"):
        tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "a.safetensors", "y": "b.safetensors"}, "b.safetensors: shard is missing"),
        ({"x": "a.safetensors", "y": "a.safetensors"}, "tensor 'y' is missing"),
        ({"x": "../a.safetensors"}, "is not a file name"),
        ({"x": 3}, "is not a file name"),
        ({}, "weight_map is missing or empty"),
        ({"z": "a.safetensors"}, "holds tensor 'x', which .* does not list"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_an_error(tmp_path, weight_map, message):
    write_json(tmp_path / "config.json", {})
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(WeightError, match=message):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    write_json(tmp_path / "config.json", {})
    for shard, names in {"a": "xy", "b": "yz"}.items():
        tensors = {name: np.zeros(3, np.float32) for name in names}
        save_file(tensors, tmp_path / f"{shard}.safetensors")
    listed = {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": listed})
    with pytest.raises(WeightError, match=r"holds tensor 'y', which .* lists in a\.safetensors"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    write_json(tmp_path / "config.json", {})
    (tmp_path / "pytorch_model.bin").write_bytes(b"junk")
    with pytest.raises(WeightError, match="pickled weights are never read"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path):
    folder = write_llama_folder(tmp_path, shards=1)
    with open_checkpoint(folder) as checkpoint:
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(4096)
        with pytest.raises(WeightError, match=r"model\.safetensors: tensor .* became shorter"):
            checkpoint.read(checkpoint.names[-1])


def test_config_json_must_be_an_object(tmp_path):
    for text in ("[]", "{", "[" * 100_000, "\udcff"):
        data = text.encode("utf-8", "surrogateescape")
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(WeightError, match=r"config\.json"):
            open_checkpoint(tmp_path)


def test_transformers_loads_the_folder(tmp_path):
    config = json.loads((write_llama_folder(tmp_path) / "config.json").read_text())
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaConfig"
    assert loaded.num_key_value_heads == config["num_key_value_heads"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == config["vocab_size"]
