"""The text side of one model: its tokenizer, its chat template, its sampling defaults."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.request import SamplingParams
from jaxserve.errors import ConfigError
from jaxserve.models.checkpoint import open_checkpoint, resolve, tokenizer_files
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.message_format import MessageFormat, message_format
from jaxserve.text.tokenizer import Tokenizer

# generation_config.json's name, ours.
DEFAULTED = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "skip_special_tokens": "skip_special_tokens",
    "max_new_tokens": "max_tokens",
}

logger = logging.getLogger("jaxserve")


@dataclass(frozen=True, kw_only=True)
class ModelText:
    """What turns a client's text into tokens and back. Any thread may use it."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    defaults: Mapping[str, Any]  # SamplingParams fields for requests that leave them out
    format: MessageFormat = MessageFormat()


def find_model(config: EngineConfig) -> Path:
    """Returns the model's folder or file, downloading it when it is a Hub id."""
    return resolve(config.model, revision=config.revision)


def load_text(path: Path, engine: EngineConfig, server: ServerConfig) -> ModelText:
    """Reads the text side of the model at `path`. Raises `ConfigError` or `WeightError`."""
    source = path
    if engine.tokenizer != "auto":
        source = resolve(engine.tokenizer)  # `revision` is the model's
    tokenizer = Tokenizer.from_files(tokenizer_files(source))
    template_text = server_template(server.chat_template) or tokenizer.chat_template
    template = None
    if template_text:
        template = ChatTemplate(template_text, special_tokens=tokenizer.special_tokens)
    defaults: Mapping[str, Any] = {}
    if server.generation_config == "auto":
        with open_checkpoint(path) as checkpoint:
            defaults = sampling_defaults(checkpoint.generation_config, "generation_config.json")
    if server.override_generation_config:
        given = override_table(server.override_generation_config)
        defaults = {**defaults, **sampling_defaults(given, "override_generation_config")}
    if defaults:
        logger.info("sampling defaults of the model: %s", defaults)
    format = message_format(server.tool_call_parser, server.reasoning_parser, template_text)
    logger.info(
        "tool calls are read as %s, reasoning as %s", format.tools_name, format.reasoning_name
    )
    return ModelText(
        tokenizer=tokenizer,
        chat_template=template,
        defaults=defaults,
        format=format,
    )


def server_template(option: str) -> str:
    """Returns the template that --chat-template names or is. Raises `ConfigError`."""
    if not option or "{" in option or "\n" in option:
        return option
    try:
        return Path(option).read_text()
    except OSError as error:
        raise ConfigError(f"chat_template {option!r} cannot be read: {error.strerror}") from error


def override_table(option: str) -> Mapping[str, Any]:
    """Returns the table that --override-generation-config is. Raises `ConfigError`."""
    try:
        table = json.loads(option)
    except ValueError as error:
        raise ConfigError(f"override_generation_config is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"override_generation_config is {option[:100]!r}; it must be an object")
    if unknown := sorted(table.keys() - DEFAULTED.keys()):
        raise ConfigError(
            f"override_generation_config has the keys {unknown}; known: {sorted(DEFAULTED)}"
        )
    return table


def sampling_defaults(
    generation_config: Mapping[str, Any], source: str = "generation_config.json"
) -> dict[str, Any]:
    """Returns the sampling options of `source`, by our names, checked."""
    defaults = {
        ours: generation_config[theirs]
        for theirs, ours in DEFAULTED.items()
        if generation_config.get(theirs) is not None
    }
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    return defaults
