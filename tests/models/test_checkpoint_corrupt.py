"""Damaged checkpoints: always one WeightError that names the file, within two seconds."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint import open_checkpoint, tokenizer_files
from tests.checkpoints import write_json, write_llama_folder, write_llama_gguf

MAX_SECONDS = 2.0
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder of one file, with its GGUF twin inside."""
    path = write_llama_folder(tmp_path_factory.mktemp("good"), shards=1)
    write_llama_gguf(path / "twin.gguf", path)
    return path


def read_everything(path: Path) -> None:
    """Opens a checkpoint, reads every tensor and the tokenizer."""
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.names:
            checkpoint.read(name)
    tokenizer_files(path)


def refusal(path: Path, file: Path) -> str | None:
    """Returns the one-line error of reading everything at `path`, which names `file`; or None."""
    start = time.monotonic()
    try:
        read_everything(path)
    except WeightError as error:
        message = str(error)
        assert str(file) in message
        assert "\n" not in message
        return message
    finally:
        assert time.monotonic() - start < MAX_SECONDS
    return None


def with_header(header: dict[str, Any], num_bytes: int) -> bytes:
    """Returns a safetensors file of a header and zeros."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """Returns the header entry of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("part", range(0, 100, 7))
@pytest.mark.parametrize("name", ["model.safetensors", "twin.gguf"])
def test_a_truncated_file_is_refused(tmp_path, folder, name, part):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    data = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * part // 100])
    target = tmp_path if name == "model.safetensors" else tmp_path / name
    assert refusal(target, tmp_path / name)


@pytest.mark.parametrize("length", [*range(0, 41, 3), 100, 1000])
def test_a_file_cut_inside_its_header_is_refused(tmp_path, folder, length):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name, target in {
        "model.safetensors": tmp_path,
        "twin.gguf": tmp_path / "twin.gguf",
    }.items():
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:length])
        assert refusal(target, tmp_path / name)


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        ({"x": entry(shape=[3])}, 8, "needs 12 bytes, but data_offsets"),
        ({"x": entry(shape=[-1])}, 8, "impossible shape"),
        ({"x": entry(shape=[2.0])}, 8, "impossible shape"),
        ({"x": entry(shape=[True, True])}, 8, "impossible shape"),
        ({"x": entry(shape=[2**40, 2**40])}, 8, "needs .* bytes"),
        ({"x": entry(shape="ab")}, 8, "impossible shape"),
        ({"x": entry(shape=[1] * 99)}, 8, "impossible shape"),
        ({"x": entry(offsets=[8, 0])}, 8, "hold -8"),
        ({"x": entry(offsets=[0])}, 8, "impossible data_offsets"),
        ({"x": entry(offsets=None)}, 8, "impossible data_offsets"),
        ({"x": entry(dtype="F4")}, 8, "type 'F4' cannot be read"),
        ({"x": entry(dtype=["F32"])}, 8, "cannot be read"),
        ({"x": 5}, 8, "not an object"),
        ({"x": entry()}, 4, "the file has 4: truncated"),
        ({"x": entry()}, 12, "4 bytes after the last tensor"),
        ({"x": entry(), "y": entry()}, 16, "starts at byte 0 of the data, expected 8"),
        ({"x": entry(), "y": entry(offsets=[12, 20])}, 20, "starts at byte 12"),
    ],
)
def test_a_wrong_safetensors_header_is_refused(tmp_path, folder, header, num_bytes, message):
    write_json(tmp_path / "config.json", {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(header, num_bytes))
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 200 * 2**20, 9])
def test_a_wrong_header_length_is_refused(tmp_path, folder, length):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    assert refusal(tmp_path, path)


def test_a_tensor_named_twice_in_a_header_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {})
    text = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0")
    with pytest.raises(WeightError, match=r"model\.safetensors: header: 'x' appears twice"):
        open_checkpoint(tmp_path)


def patched(at: int, code: str, value: int) -> Callable[[bytearray], None]:
    """Returns a change that overwrites a number at a byte."""
    return lambda data: struct.pack_into("<" + code, data, at, value)


def after(key: bytes, change: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    """Returns a change whose byte 0 is the first after `key`."""

    def apply(data: bytearray) -> None:
        place = data.index(key) + len(key)
        tail = data[place:]
        change(tail)
        data[place:] = tail

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (patched(0, "I", 0), "not a GGUF file"),
        (patched(4, "I", 1), "version 1 is not supported"),
        (patched(8, "Q", 2**60), "truncated or corrupt: 1152921504606846976 tensors"),
        (patched(16, "Q", 2**60), "truncated or corrupt: 1152921504606846976 metadata entries"),
        (patched(24, "Q", 2**62), "truncated or corrupt: 4611686018427387904 bytes in a string"),
        (after(b"llama.block_count", patched(0, "I", 77)), "unknown value type 77"),
        (after(b"ggml.tokens", patched(4, "I", 9)), "unknown value type 9"),
        (after(b"ggml.tokens", patched(8, "Q", 2**61)), "2305843009213693952 strings"),
        (after(b"ggml.token_type", patched(8, "Q", 2**61)), "2305843009213693952 array elements"),
        (after(b"token_embd.weight", patched(0, "I", 9)), "9 dimensions"),
        (after(b"token_embd.weight", patched(4, "Q", 2**63)), "needs bytes up to"),
        (after(b"token_embd.weight", patched(4, "Q", 0)), "impossible shape"),
        (after(b"token_embd.weight", patched(20, "I", 999)), "unknown tensor type 999"),
        (after(b"token_embd.weight", patched(24, "Q", 2**63)), "needs bytes up to"),
        (after(b"token_embd.weight", patched(24, "Q", 33)), "not a multiple of 32"),
        (after(b"output_norm.weight", patched(16, "Q", 0)), "overlaps the tensor before it"),
    ],
)
def test_a_damaged_gguf_header_is_refused(tmp_path, folder, change, message):
    data = bytearray((folder / "twin.gguf").read_bytes())
    change(data)
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    found = refusal(path, path)
    assert found is not None and message in found


@FUZZ
@given(data=st.data())
def test_random_bytes_in_a_gguf_header_never_raise_anything_else(tmp_path, folder, data):
    content = bytearray((folder / "twin.gguf").read_bytes())
    end = content.index(b"output_norm.weight") + 60
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, end))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    refusal(path, path)


@FUZZ
@given(data=st.data())
def test_random_bytes_in_a_safetensors_header_never_raise_anything_else(tmp_path, folder, data):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    content = bytearray((folder / "model.safetensors").read_bytes())
    (length,) = struct.unpack_from("<Q", content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 8 + length - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    refusal(tmp_path, path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 24])
def test_junk_of_any_size_is_refused(tmp_path, size):
    write_json(tmp_path / "config.json", {})
    for name, target in {"model.safetensors": tmp_path, "x.gguf": tmp_path / "x.gguf"}.items():
        (tmp_path / name).write_bytes(b"\xff" * size)
        assert refusal(target, tmp_path / name)
