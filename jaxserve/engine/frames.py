"""How a message travels on any of our sockets: a 4-byte big-endian length, then msgpack.

Host only: imports no jax.
"""

from __future__ import annotations

import struct

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 2**30


def frame_of(body: bytes) -> bytes:
    """Returns a message with its length in front."""
    assert len(body) <= MAX_FRAME_BYTES, len(body)
    return LENGTH.pack(len(body)) + body
