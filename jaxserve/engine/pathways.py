"""Pathways on Cloud: one jax process that drives every host of a slice through a proxy."""

from __future__ import annotations

import jax

from jaxserve.errors import ConfigError

PLATFORM = "proxy"


def initialize_pathways() -> None:
    """Registers the proxy with jax if JAX_PLATFORMS names it; must come before any device is used.

    Raises `ConfigError` where pathwaysutils, which knows how, is not installed.
    """
    # jax adds its options to `config` at run time.
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    if PLATFORM not in platforms.split(","):
        return
    try:
        import pathwaysutils
    except ImportError as error:
        raise ConfigError(
            f"JAX_PLATFORMS is {platforms!r}, but pathwaysutils cannot be imported ({error}); "
            "install jaxserve[pathways]"
        ) from error
    pathwaysutils.initialize()
