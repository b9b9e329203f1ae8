"""Where a server is that `chat` or `bench serve` talks to."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from jaxserve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    path: str  # before /v1/..., without a slash at its end
    is_tls: bool
    api_key: str


def parse_server(url: str, api_key: str = "") -> Server:
    """Returns the server at `url`, with or without /v1 at its end; `ConfigError` if it is none."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is not a URL such as http://127.0.0.1:8000")
    return Server(
        host=parts.hostname,
        port=port or (443 if parts.scheme == "https" else 80),
        path=parts.path.rstrip("/").removesuffix("/v1"),
        is_tls=parts.scheme == "https",
        api_key=api_key,
    )
