"""Meshes of devices: what `--mesh` asks for, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import dataclasses
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

# The axes of every mesh, but for the order: `data` comes first, and the others split the devices
# of a rank. KV heads are split along the axes up to `tensor`, experts along those up to `expert`:
# whichever are fewer come first, and either may be held by several devices.
AXES = ("data", "expert", "tensor", "copy")

# A matrix is split along what its product is split along: heads, ffw and experts are independent
# until their outputs are summed, vocab until sampling. hidden is what layers exchange: whole on
# every device, as routers are. Slots, pages and tokens belong to a rank, which computes them alone.
#
# Of each logical axis: the axes of the mesh that split it, all after the first named and up to the
# last; None for what nothing splits.
_SPANS: dict[str, tuple[str | None, str] | None] = {
    "rank": (None, "data"),
    "vocab": ("data", "copy"),
    "heads": ("data", "copy"),
    "kv_heads": ("data", "tensor"),
    "ffw": ("data", "copy"),
    "experts": ("data", "expert"),
    "expert_ffw": ("expert", "copy"),
    "router": None,
    "hidden": None,
}


def mesh_axes_of(
    axis: str,  # logical
    names: Sequence[str],  # of a mesh's axes, in order
) -> tuple[str, ...]:
    """Returns the axes of a mesh that split a logical axis: the one table of it."""
    if (span := _SPANS[axis]) is None:
        return ()
    after, last = span
    first = 0 if after is None else names.index(after) + 1
    return tuple(names[first : names.index(last) + 1])


class Widths(Protocol):
    """What must divide: the sizes in a model's config."""

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def ffw_size(self) -> int: ...

    @property
    def num_experts(self) -> int: ...  # of each layer that has any; 0: none has

    @property
    def expert_ffw_size(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """What `--mesh` asks for."""

    data: int = 1  # ranks, each with sequences and pages of its own
    expert: int = 1  # groups of a rank's devices, each with experts of its own
    tensor: int = 1  # devices of such a group

    def __str__(self) -> str:
        sizes = (self.data, self.tensor) if self.expert == 1 else dataclasses.astuple(self)
        return "x".join(map(str, sizes))

    @property
    def axes(self) -> str:
        """What the numbers that it is written as are."""
        return "data x tensor" if self.expert == 1 else "data x expert x tensor"

    @property
    def rank_devices(self) -> int:
        """The devices that share each rank's heads, feed-forward and vocabulary."""
        return self.expert * self.tensor

    @property
    def num_devices(self) -> int:
        """The devices it takes."""
        return self.data * self.rank_devices


def parse_mesh(description: str) -> MeshShape:
    """Returns what `2x4`, `2x2x2`, `data=2,tensor=4` or `4` describe.

    Two numbers are data and tensor, three are data, expert and tensor, one is tensor. Raises
    ConfigError for anything else.
    """
    text = description.replace(" ", "")
    if match := re.fullmatch(r"(?:(\d+)x)?(?:(\d+)x)?(\d+)", text):
        data, expert, tensor = (int(size or 1) for size in match.groups())
        sizes = {"data": data, "expert": expert, "tensor": tensor}
    elif re.fullmatch(r"[a-z]+=\d+(,[a-z]+=\d+)*", text):
        pairs = [part.split("=") for part in text.split(",")]
        sizes = {name: int(size) for name, size in pairs}
        if len(sizes) < len(pairs) or not sizes.keys() <= {"data", "expert", "tensor"}:
            raise ConfigError(
                f"mesh {description!r} must name data, expert and tensor, each at most once"
            )
    else:
        raise ConfigError(
            f"mesh {description!r} is not understood; write 2x4 (data x tensor), 2x2x2 (data x "
            "expert x tensor) or data=2,tensor=4"
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
    if shape.num_devices == 1:
        return mesh_of_one(devices[0])
    kv_parts = min(shape.rank_devices, widths.num_kv_heads)
    first, second = sorted((shape.expert, kv_parts))
    names = ("expert", "tensor") if first == shape.expert else ("tensor", "expert")
    # On a TPU neighbours in the mesh become neighbours on the wires.
    grid = mesh_utils.create_device_mesh(
        (shape.data, first, second // first, shape.rank_devices // second),
        devices[: shape.num_devices],
        allow_split_physical_axes=True,
    )
    return Mesh(grid, ("data", *names, "copy"))


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
    reason = _misfit(widths, shape)
    if reason is None:
        return
    count = shape.num_devices
    fitting = [
        size for size in range(1, count + 1) if _misfit(widths, MeshShape(tensor=size)) is None
    ]
    meshes = [f"{count // size}x{size}" for size in fitting if count % size == 0]
    raise ConfigError(
        f"mesh {shape} does not fit the model: {reason}. With {count} devices "
        f"{' and '.join(meshes)} would; tensor may be {', '.join(map(str, fitting))}"
    )


def _misfit(widths: Widths, shape: MeshShape) -> str | None:
    """Returns why a model cannot be split over the devices of a rank."""
    heads, kv_heads, ffw = widths.num_heads, widths.num_kv_heads, widths.ffw_size
    count, expert = shape.rank_devices, shape.expert
    given = f"tensor={count}" if expert == 1 else f"expert={expert} times tensor={shape.tensor}"
    if heads % count:
        return f"{given} does not divide its {heads} heads"
    if kv_heads % count and count % kv_heads:
        return f"{given} neither divides its {kv_heads} KV heads nor is a multiple of them"
    if ffw % count:
        return f"{given} does not divide its feed-forward width of {ffw}"
    return _expert_misfit(widths, shape)


def _expert_misfit(widths: Widths, shape: MeshShape) -> str | None:
    num_experts, expert = widths.num_experts, shape.expert
    if not num_experts:
        return None if expert == 1 else f"expert={expert} is for a model with experts"
    if num_experts % expert:
        return f"expert={expert} does not divide its {num_experts} experts"
    if widths.expert_ffw_size % shape.tensor:
        return (
            f"tensor={shape.tensor} does not divide its experts' width of {widths.expert_ffw_size}"
        )
    kv_parts = min(shape.rank_devices, widths.num_kv_heads)
    if kv_parts % expert and expert % kv_parts:
        return f"expert={expert} and its KV heads in {kv_parts} parts do not go together"
    return None


def spec_for(mesh: Mesh, axes: Sequence[str | None]) -> PartitionSpec:
    """Returns how an array with these logical axes is split."""
    return PartitionSpec(*(axis and (mesh_axes_of(axis, mesh.axis_names) or None) for axis in axes))


def sharding_for(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Returns where an array with these logical axes lives."""
    return NamedSharding(mesh, spec_for(mesh, axes))


def num_parts(mesh: Mesh, axis: str | None) -> int:
    """Returns into how many parts a mesh splits a logical axis."""
    if axis is None:
        return 1
    return math.prod(mesh.shape[name] for name in mesh_axes_of(axis, mesh.axis_names))


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
