"""Names of mesh axes, and the one table that maps a parameter's logical axes to them."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ConfigError

AXES = ("data", "tensor")

# A matrix is split along what its product is split along: heads and ffw are independent until the
# output projection, vocab until sampling. hidden is what layers exchange: whole on every device.
MESH_AXIS_OF: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffw": "tensor",
    "experts": None,
    "expert_ffw": "tensor",
    "router": None,
    "hidden": None,
}


def mesh_for(description: str) -> Mesh:
    """Returns the mesh that `--mesh` asks for; ConfigError for one that cannot be had."""
    if description not in ("1", "1x1"):
        raise ConfigError(f"mesh {description!r} is not supported; only 1 (one device) is so far")
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES)


def sharding_for(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """Returns where a parameter with these logical axes lives."""
    return NamedSharding(mesh, PartitionSpec(*(axis and MESH_AXIS_OF[axis] for axis in axes)))
