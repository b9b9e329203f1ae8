"""What a log line looks like: text for people, JSON for collectors."""

from __future__ import annotations

import json
import logging
from typing import Any

from jaxserve.config import ServerConfig


def configure_log(config: ServerConfig) -> None:
    """Sends the log to standard error in the form that the options ask for."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else TextFormatter())
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,123 INFO request status=200 seconds=0.1`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line, the record's fields behind its message."""
        line = super().formatMessage(record)
        return " ".join([line, *(f"{name}={_word(value)}" for name, value in _fields(record))])


class JsonFormatter(logging.Formatter):
    """One object on a line: time, level, message, then the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        told: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{record.msecs:03.0f}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **dict(_fields(record)),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def _fields(record: logging.LogRecord) -> list[tuple[str, Any]]:
    return list(getattr(record, "fields", {}).items())


def _word(value: Any) -> str:
    """Returns the value without blanks or line breaks, which a client may have put into a path."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return (
        json.dumps(text)
        if any(letter in text for letter in ' "\\=') or not text.isprintable()
        else text
    )
