"""Reads the tokenizer files of a Hugging Face model folder.

Host only: imports no jax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxserve.errors import WeightError
from jaxserve.models.checkpoint.contract import TokenizerFiles
from jaxserve.models.checkpoint.files import read_json, read_text

# transformers writes 1e30 where it knows no limit.
_NO_LIMIT = 10**9


def folder_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Returns the folder's tokenizer files. Raises `WeightError` where there is no tokenizer."""
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise WeightError(
            f"{folder}: has no tokenizer.json (a tokenizer.model alone is not supported: "
            "convert it once with transformers' save_pretrained)"
        )
    config = _optional_json(folder / "tokenizer_config.json")
    special = {**_optional_json(folder / "special_tokens_map.json"), **config}
    return TokenizerFiles(
        tokenizer_json=read_text(source),
        bos_token=_token_text(special.get("bos_token")),
        eos_token=_token_text(special.get("eos_token")),
        pad_token=_token_text(special.get("pad_token")),
        unk_token=_token_text(special.get("unk_token")),
        add_bos_token=_optional_bool(config.get("add_bos_token")),
        add_eos_token=_optional_bool(config.get("add_eos_token")),
        chat_template=_chat_template(folder, config),
        model_max_length=_limit(config.get("model_max_length")),
        tokenizer_config=config,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _optional_bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _limit(value: Any) -> int | None:
    return int(value) if type(value) in (int, float) and 0 < value < _NO_LIMIT else None


def _token_text(value: Any) -> str | None:
    # A token is its text, or the fields of an AddedToken.
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    # The newest place wins, as in transformers: a .jinja file, a .json file, the configuration.
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    stored = _optional_json(folder / "chat_template.json") or config
    template = stored.get("chat_template")
    if isinstance(template, list):
        named = {
            entry["name"]: entry["template"]
            for entry in template
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
        template = named.get("default")
    return template if isinstance(template, str) else None
