"""The OpenAI-compatible HTTP server."""

from jaxserve.server.life import build_app

__all__ = ["build_app"]
