"""For ASGI servers that call a factory: `uvicorn --factory jaxserve.asgi:create_app`.

JAXSERVE_CONFIG names the TOML file that `jaxserve serve --config` would take.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from starlette.types import ASGIApp

from jaxserve.cli import serve_configs
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.cluster import check_alone
from jaxserve.errors import ConfigError

# What whoever hosts the application decides: it opens the socket and writes the log.
HOST_DECIDES = ("host", "port", "header_timeout_s", "log_level", "log_format")


def create_app() -> ASGIApp:
    """Returns the application that JAXSERVE_CONFIG describes; `ConfigError` if it names no file."""
    from jaxserve.server import build_app

    path = os.environ.get("JAXSERVE_CONFIG")
    if not path:
        raise ConfigError("JAXSERVE_CONFIG is not set; it must name a TOML file")
    return build_app(*hosted_configs(["--config", path]))


def hosted_configs(argv: Sequence[str]) -> tuple[EngineConfig, ServerConfig]:
    """Returns both configs from `serve`'s arguments, for an application under another host.

    Raises `ConfigError` if they set what only the host can, or what several processes need.
    """
    engine, server = serve_configs(argv)
    check_alone(server)
    defaults = ServerConfig()
    for name in HOST_DECIDES:
        value = getattr(server, name)
        if value != getattr(defaults, name):
            raise ConfigError(f"{name} is {value!r}, but the host of the application decides it")
    return engine, server
