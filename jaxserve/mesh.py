"""Meshes of devices: what `--mesh` asks for, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ConfigError

# `--mesh` speaks of data and tensor. Where tensor is more than there are KV heads, `copy` counts
# the devices that hold the same ones; tensor and copy together are then what tensor asked for.
AXES = ("data", "tensor", "copy")
_TENSOR = ("tensor", "copy")

# A matrix is split along what its product is split along: heads and ffw are independent until the
# output projection, vocab until sampling. hidden is what layers exchange: whole on every device.
# Slots, pages and tokens of a step belong to a rank, which computes them alone.
MESH_AXES_OF: dict[str, tuple[str, ...]] = {
    "rank": ("data",),
    "vocab": _TENSOR,
    "heads": _TENSOR,
    "kv_heads": ("tensor",),
    "ffw": _TENSOR,
    "hidden": (),
}


class Widths(Protocol):
    """What must divide: the sizes in a model's config."""

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def ffw_size(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """What `--mesh` asks for."""

    data: int = 1  # ranks, each with sequences and pages of its own
    tensor: int = 1  # devices that share each rank's heads, ffw and vocabulary

    def __str__(self) -> str:
        return f"{self.data}x{self.tensor}"

    @property
    def num_devices(self) -> int:
        """The devices it takes."""
        return self.data * self.tensor


def parse_mesh(description: str) -> MeshShape:
    """Returns what `2x4` (data x tensor), `data=2,tensor=4` or `4` (tensor) describe.

    Raises ConfigError for anything else.
    """
    text = description.replace(" ", "")
    if match := re.fullmatch(r"(?:(\d+)x)?(\d+)", text):
        sizes = {"data": int(match[1] or 1), "tensor": int(match[2])}
    elif re.fullmatch(r"[a-z]+=\d+(,[a-z]+=\d+)*", text):
        pairs = [part.split("=") for part in text.split(",")]
        sizes = {name: int(size) for name, size in pairs}
        if len(sizes) < len(pairs) or not sizes.keys() <= {"data", "tensor"}:
            raise ConfigError(f"mesh {description!r} must name data and tensor, each at most once")
    else:
        raise ConfigError(
            f"mesh {description!r} is not understood; write 2x4 (data x tensor) or data=2,tensor=4"
        )
    if 0 in sizes.values():
        raise ConfigError(f"mesh {description!r} has a size of 0; every size is at least 1")
    return MeshShape(**sizes)


def mesh_for(
    shape: MeshShape,
    widths: Widths,
    devices: Sequence[jax.Device] | None = None,  # default: all there are; the first are taken
) -> Mesh:
    """Returns the mesh of a model.

    Raises ConfigError where devices are too few, or where the model's widths do not divide.
    """
    devices = jax.devices() if devices is None else devices
    _check_devices(shape, devices)
    _check_widths(shape, widths)
    tensor = min(shape.tensor, widths.num_kv_heads)
    sizes = (shape.data, tensor, shape.tensor // tensor)
    if shape.num_devices == 1:
        return mesh_of_one(devices[0])
    # On a TPU neighbours in the mesh become neighbours on the wires.
    grid = mesh_utils.create_device_mesh(
        sizes, devices[: shape.num_devices], allow_split_physical_axes=True
    )
    return Mesh(grid, AXES)


def mesh_of_one(device: jax.Device | None = None) -> Mesh:
    """Returns the mesh of one device, which fits every model."""
    device = jax.devices()[0] if device is None else device
    return Mesh(np.array([device]).reshape((1,) * len(AXES)), AXES)


def _check_devices(shape: MeshShape, devices: Sequence[jax.Device]) -> None:
    if (count := shape.num_devices) <= len(devices):
        return
    platform = devices[0].platform
    message = f"mesh {shape} needs {count} devices; there are {len(devices)} ({platform})"
    if platform == "cpu":
        message += f". To try it on a CPU, set JAX_NUM_CPU_DEVICES={count}"
    raise ConfigError(message)


def _check_widths(shape: MeshShape, widths: Widths) -> None:
    reason = _misfit(widths, shape.tensor)
    if reason is None:
        return
    count = shape.num_devices
    fitting = [size for size in range(1, count + 1) if _misfit(widths, size) is None]
    meshes = [f"{count // size}x{size}" for size in fitting if count % size == 0]
    raise ConfigError(
        f"mesh {shape} does not fit the model: {reason}. With {count} devices "
        f"{' and '.join(meshes)} would; tensor may be {', '.join(map(str, fitting))}"
    )


def _misfit(widths: Widths, tensor: int) -> str | None:
    """Returns why a model cannot be split over so many devices."""
    heads, kv_heads, ffw = widths.num_heads, widths.num_kv_heads, widths.ffw_size
    if heads % tensor:
        return f"tensor={tensor} does not divide its {heads} heads"
    if kv_heads % tensor and tensor % kv_heads:
        return f"tensor={tensor} neither divides its {kv_heads} KV heads nor is a multiple of them"
    if ffw % tensor:
        return f"tensor={tensor} does not divide its feed-forward width of {ffw}"
    return None


def spec_for(axes: Sequence[str | None]) -> PartitionSpec:
    """Returns how an array with these logical axes is split."""
    return PartitionSpec(*(None if axis is None else MESH_AXES_OF[axis] or None for axis in axes))


def sharding_for(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Returns where an array with these logical axes lives."""
    return NamedSharding(mesh, spec_for(axes))


def num_parts(mesh: Mesh, axis: str | None) -> int:
    """Returns into how many parts a mesh splits a logical axis."""
    return 1 if axis is None else math.prod(mesh.shape[name] for name in MESH_AXES_OF[axis])


def put(
    array: np.ndarray,  # whole, the same in every process
    sharding: NamedSharding,
) -> jax.Array:
    """Returns a host's array on the devices; each process gives its own devices their parts."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def local_device(mesh: Mesh) -> jax.Device:
    """Returns a device of the mesh that this process has, the first of all if it has none."""
    devices: list[jax.Device] = list(mesh.devices.flat)
    own = (device for device in devices if device.process_index == jax.process_index())
    return next(own, devices[0])


def num_processes(mesh: Mesh) -> int:
    """Returns how many processes hold devices of a mesh."""
    return len({device.process_index for device in mesh.devices.flat})
