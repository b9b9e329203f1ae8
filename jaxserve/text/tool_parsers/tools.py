"""What parsers know of a request's tools. Host only: imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Tools: TypeAlias = Mapping[str, Mapping[str, Any]]  # name -> JSON schema of the arguments
