"""Who may pass: bearer keys, on the raw path, everything closed that is not listed as open."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import Scope

from jaxserve.errors import AuthenticationError

OPEN_PATHS = frozenset({"/health", "/ready", "/ping"})


def hash_keys(keys: Sequence[str]) -> tuple[bytes, ...]:
    """Returns a digest of each key; only digests are compared, so lengths do not show."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def is_open(scope: Scope) -> bool:
    """True for probes and for CORS preflights, which browsers send without a key.

    Reads `scope["path"]`: `request.url.path` is built from the Host header, which a client
    writes (CVE-2026-48746).
    """
    return scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"


def authenticate(scope: Scope, digests: Sequence[bytes]) -> None:
    """Raises `AuthenticationError` unless the request is open or brings one of the keys."""
    if not digests or is_open(scope):
        return
    key = _key_of(scope)
    if key is None:
        raise AuthenticationError("an API key is required: Authorization: Bearer KEY")
    given = hashlib.sha256(key).digest()
    # Every key is compared, whichever matches, so that timing tells nothing.
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    if not any(matches):
        raise AuthenticationError("the API key is wrong")


def _key_of(scope: Scope) -> bytes | None:
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and key.strip():
        return key.strip()
    return headers.get(b"x-api-key")
