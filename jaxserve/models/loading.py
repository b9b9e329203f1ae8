"""Builds a model abstractly and fills its parameters from a checkpoint, slice by slice."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxserve.errors import WeightError
from jaxserve.mesh import num_parts, put, sharding_for
from jaxserve.models.checkpoint import Checkpoint, QuantizedCheckpoint, WeightFormat
from jaxserve.models.checkpoint.kv_scales import KV_SCALE_NAMES
from jaxserve.models.quantizing import (
    TYPE_OF,
    abstract_weight,
    dummy_arrays,
    is_layer_matrix,
    load_time_format,
    num_bytes,
    quantized_arrays,
    refine,
)
from jaxserve.models.registry import family_for
from jaxserve.ops.quantization import QuantizedWeight
from jaxserve.ops.vocab import BLOCK_TOKENS

Formats: TypeAlias = Mapping[str, WeightFormat] | WeightFormat  # by name, or of every matrix


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of the checkpoint, and what the model holds of it."""

    name: str  # as in Hugging Face checkpoints
    stored_shape: tuple[int, ...]  # in the checkpoint
    dense: jax.ShapeDtypeStruct  # before it is quantised, padded, with its sharding
    value: jax.ShapeDtypeStruct | QuantizedWeight  # of ShapeDtypeStructs with shardings
    is_stored_quantized: bool  # by the checkpoint


@dataclass(frozen=True, kw_only=True)
class AbstractModel:
    """A model without numbers: its graph, and the parameters it wants."""

    config: Any  # the family's
    graph: nnx.GraphDef[Any]
    tree: jax.tree_util.PyTreeDef  # of the parameters; their flat order is that of `shapes`
    parameters: tuple[Parameter, ...]
    vocab_size: int  # the config's, padded to whole blocks on each device
    is_tied: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, as in Hugging Face checkpoints."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arrays that hold the parameters, several for a quantised one, with shardings."""
        return tuple(jax.tree.leaves([parameter.value for parameter in self.parameters]))

    @property
    def quantization(self) -> str:
        """The types of quantised weights, such as "int8"; "none" without any."""
        values = (parameter.value for parameter in self.parameters)
        types = {value.data.dtype.name for value in values if isinstance(value, QuantizedWeight)}
        return ", ".join(sorted(types)) or "none"

    @property
    def num_params(self) -> int:
        """The number of weights."""
        return sum(math.prod(parameter.stored_shape) for parameter in self.parameters)

    @property
    def device_bytes(self) -> int:
        """The bytes that the parameters take on each device."""
        return sum(num_bytes(shape) for shape in self.shapes)


def abstract_model(
    hf_config: dict[str, Any],
    mesh: Mesh,
    *,
    dtype: jnp.dtype,
    activation_dtype: jnp.dtype,
    quantization: str = "auto",  # of matrices at load, as `EngineConfig` has it
    formats: Formats | None = None,  # of what the checkpoint holds quantised
    uses_kernels: bool = True,  # for products with quantised matrices, where they can
) -> AbstractModel:
    """Returns the model that a Hugging Face config describes; WeightError if it is unknown."""
    family, config = family_for(hf_config), config_of(hf_config)
    _check_request(quantization, formats)
    vocab_size = padded_vocab(config.vocab_size, mesh)
    build = functools.partial(family.model, config, dtype=dtype, activation_dtype=activation_dtype)
    graph, state = nnx.split(nnx.eval_shape(build))
    flat, parameters = [], []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(str(part) for part in path)
        axes = variable.get_metadata("axes")
        leaf = variable.get_value()
        shape = tuple(
            vocab_size if axis == "vocab" else size
            for axis, size in zip(axes, leaf.shape, strict=True)
        )
        dense = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding_for(mesh, axes))
        if not formats:
            format = load_time_format(quantization, axes, leaf.shape)
        elif isinstance(formats, WeightFormat):
            format = formats if is_layer_matrix(axes) else None
        else:
            format = formats.get(name)
        value: Any = dense
        if format is not None:
            value = abstract_weight(format, dense, axes, mesh, uses_kernels=uses_kernels)
        flat.append((path, variable.replace(value)))
        parameters.append(
            Parameter(
                name=name,
                stored_shape=leaf.shape,
                dense=dense,
                value=value,
                is_stored_quantized=bool(formats) and format is not None,
            )
        )
    model = AbstractModel(
        config=config,
        graph=graph,
        tree=jax.tree.structure(nnx.from_flat_state(flat)),
        parameters=tuple(parameters),
        vocab_size=vocab_size,
        is_tied=config.is_tied,
    )
    assert model.tree.num_leaves == len(model.shapes), (model.tree, model.shapes)
    return model


def config_of(hf_config: dict[str, Any]) -> Any:
    """Returns the family's config of a Hugging Face config; WeightError if it is unknown."""
    family = family_for(hf_config)
    try:
        return family.config.from_hf(hf_config)
    except KeyError as error:
        raise WeightError(f"config.json: lacks {error.args[0]!r}") from error


def padded_vocab(vocab_size: int, mesh: Mesh) -> int:
    """Returns the vocabulary's size in whole blocks, the same number on each device."""
    unit = BLOCK_TOKENS * num_parts(mesh, "vocab")
    return -(-vocab_size // unit) * unit


def _check_request(quantization: str, formats: Formats | None) -> None:
    stored = [formats] if isinstance(formats, WeightFormat) else (formats or {}).values()
    types = sorted({format.type for format in stored})
    if types and quantization != "auto" and types != [TYPE_OF[quantization]]:
        raise WeightError(
            f"quantization is {quantization!r}; the checkpoint is quantised already, to "
            f"{', '.join(types)}: leave the option out"
        )


def stored_formats(checkpoint: Checkpoint) -> Formats:
    """Returns how the parameters that a checkpoint holds quantised are quantised.

    One opened without weights has only its config's word, which is of all layers' matrices.
    """
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return {}
    return checkpoint.formats if checkpoint.names else checkpoint.format


def load_params(
    model: AbstractModel, checkpoint: Checkpoint, report: Callable[[int, int], None]
) -> tuple[jax.Array, ...]:
    """Reads every parameter; each device's part is read alone. `report` gets (done, all).

    A parameter is quantised on its device as it comes: never is more than one there as floats.
    Raises WeightError for a parameter that the checkpoint lacks, a tensor that no parameter uses,
    or a shape that differs.
    """
    _check_names(model, checkpoint)
    params: list[jax.Array] = []
    for done, parameter in enumerate(model.parameters):
        if parameter.is_stored_quantized:
            assert isinstance(checkpoint, QuantizedCheckpoint), parameter.name
            params += _load_quantized(parameter, checkpoint)
        else:
            value, dense = parameter.value, _load(parameter, checkpoint)
            if isinstance(value, QuantizedWeight):
                params += quantized_arrays(value, dense)
            else:
                params.append(dense)
        report(done + 1, len(model.parameters))
    return tuple(params)


def dummy_params(model: AbstractModel, seed: int) -> tuple[jax.Array, ...]:
    """Returns random parameters, for measuring without a checkpoint."""
    random = np.random.default_rng(seed)

    def make(parameter: Parameter) -> list[jax.Array]:
        if isinstance(parameter.value, QuantizedWeight):
            return dummy_arrays(parameter.value, random)
        dense = parameter.dense
        is_norm = parameter.name.endswith("norm.weight")
        scale = 0.02 if len(dense.shape) > 1 else 0.0
        values = random.standard_normal(dense.shape, np.float32) * scale + float(is_norm)
        return [put(values.astype(dense.dtype), dense.sharding)]

    return tuple(array for parameter in model.parameters for array in make(parameter))


def _check_names(model: AbstractModel, checkpoint: Checkpoint) -> None:
    wanted, found = set(model.names), set(checkpoint.names)
    # A tied checkpoint may store the head again; old ones store rope's frequencies.
    spare = {name for name in found - wanted if name.endswith("rotary_emb.inv_freq")}
    spare |= {name for name in found - wanted if name.endswith(KV_SCALE_NAMES)}
    spare |= {name for name in found - wanted if _is_empty_bias(name, checkpoint)}
    if model.is_tied:
        spare.add("lm_head.weight")
    for kind, names in (
        ("lacks the parameter", wanted - found),
        ("holds a tensor that the model does not use:", found - wanted - spare),
    ):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise WeightError(f"the checkpoint {kind} {first} ({len(names)} in all)")
    for parameter in model.parameters:
        name, shape = parameter.name, parameter.stored_shape
        if checkpoint.shape(name) != shape:
            raise WeightError(
                f"{name} has shape {checkpoint.shape(name)}; config.json asks for {shape}"
            )


def _is_empty_bias(name: str, checkpoint: Checkpoint) -> bool:
    # Writers of GPTQ give every matrix a bias, of zeros where the model has none.
    stem = name.removesuffix(".bias")
    return (
        stem != name
        and isinstance(checkpoint, QuantizedCheckpoint)
        and f"{stem}.weight" in checkpoint.formats
        and not checkpoint.read(name).any()
    )


def _load(parameter: Parameter, checkpoint: Checkpoint) -> jax.Array:
    dense = parameter.dense

    def read(index: tuple[slice, ...]) -> np.ndarray:
        return checkpoint.read(parameter.name, index).astype(dense.dtype)

    return _from_parts(dense, read)


def _from_parts(
    shape: jax.ShapeDtypeStruct,  # with its sharding
    read: Callable[[tuple[slice, ...]], np.ndarray],  # a part, short where it is to be padded
) -> jax.Array:
    """Returns an array of which each part is read once, however many devices hold it."""
    indices = shape.sharding.addressable_devices_indices_map(shape.shape)
    local_shape = shape.sharding.shard_shape(shape.shape)
    by_index: dict[str, list[jax.Device]] = {}
    for device, index in indices.items():
        by_index.setdefault(repr(index), []).append(device)
    shards = []
    for devices in by_index.values():
        part = read(indices[devices[0]])
        if part.shape != local_shape:
            padding = [(0, size - had) for size, had in zip(local_shape, part.shape, strict=True)]
            part = np.pad(part, padding)
        shards += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape.shape, shape.sharding, shards)


def _load_quantized(parameter: Parameter, checkpoint: QuantizedCheckpoint) -> list[jax.Array]:
    """Returns the arrays of a matrix that the checkpoint holds quantised, as they lie there."""
    value = parameter.value
    assert isinstance(value, QuantizedWeight), parameter.name
    stored = checkpoint.read_quantized(parameter.name)
    stored = refine(stored, checkpoint.formats[parameter.name].rows, value)
    arrays = [stored.data, stored.scale, stored.zero, stored.order, stored.input_scale]
    shapes = jax.tree.leaves(value)
    held = [array for array in arrays if array is not None]
    assert [array.shape for array in held] == [shape.shape for shape in shapes], parameter.name
    return [
        _from_parts(shape, array.__getitem__) for array, shape in zip(held, shapes, strict=True)
    ]
