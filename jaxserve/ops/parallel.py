"""What the devices of a mesh say to each other inside the step, in terms of logical axes.

The step runs inside one `shard_map` over the whole mesh: every array there is the device's own
part, and nothing is exchanged but by these functions. Outside of it (one device, tests, GSPMD) an
axis is whole and they do nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.mesh import mesh_axes_of


def parts_along(axis: str) -> int:
    """Returns into how many parts a logical axis is split."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1
    for name in _names(axis):
        size *= mesh.shape[name]
    return size


def index_along(axis: str) -> jax.Array:  # [] i32
    """Returns which part of a logical axis this device holds."""
    names = _names(axis)
    return lax.axis_index(names) if names else jnp.int32(0)


def sum_over(
    x: jax.Array,  # of any shape, each device's share
    *axes: str,
) -> jax.Array:  # of the same shape
    """Returns the sum of the shares that products along split axes leave on each device."""
    names = tuple(name for axis in axes for name in _names(axis))
    return lax.psum(x, names) if names else x


def gather_along(
    x: jax.Array,  # of any shape, each device's part
    axis: str,
) -> jax.Array:  # [parts, *x.shape], in order
    """Returns the parts of all devices, the same on each.

    What decides the path of a loop or a cond is computed from this: a sum of the devices' own
    making might differ in the last bit from one to another.
    """
    names = _names(axis)
    return lax.all_gather(x, names) if names else x[None]


def _names(axis: str) -> tuple[str, ...]:
    """Returns the mesh axes that split a logical axis here."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return ()
    names = mesh_axes_of(axis, mesh.axis_names)
    return tuple(name for name in names if mesh.shape[name] > 1)
