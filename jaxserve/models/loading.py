"""Builds a model abstractly and fills its parameters from a checkpoint, slice by slice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxserve.errors import WeightError
from jaxserve.mesh import sharding_for
from jaxserve.models.checkpoint.contract import Checkpoint
from jaxserve.models.registry import family_for


@dataclass(frozen=True, kw_only=True)
class AbstractModel:
    """A model without numbers: its graph, and the parameters it wants."""

    config: Any  # the family's
    graph: nnx.GraphDef[Any]
    tree: jax.tree_util.PyTreeDef  # of the parameters; their flat order is that of `names`
    names: tuple[str, ...]  # as in Hugging Face checkpoints
    shapes: tuple[jax.ShapeDtypeStruct, ...]  # with shardings
    is_tied: bool

    @property
    def num_params(self) -> int:
        """The number of weights."""
        return sum(shape.size for shape in self.shapes)

    @property
    def param_bytes(self) -> int:
        """The bytes the parameters take, all devices together."""
        return sum(shape.size * shape.dtype.itemsize for shape in self.shapes)


def abstract_model(
    hf_config: dict[str, Any], mesh: Mesh, *, dtype: jnp.dtype, activation_dtype: jnp.dtype
) -> AbstractModel:
    """Returns the model that a Hugging Face config describes; WeightError if it is unknown."""
    family = family_for(hf_config)
    try:
        config = family.config.from_hf(hf_config)
    except KeyError as error:
        raise WeightError(f"config.json: lacks {error.args[0]!r}") from error
    build = functools.partial(family.model, config, dtype=dtype, activation_dtype=activation_dtype)
    graph, state = nnx.split(nnx.eval_shape(build))
    leaves, tree = jax.tree.flatten(state)
    flat = nnx.to_flat_state(state)
    names = tuple(".".join(str(part) for part in path) for path, _ in flat)
    shapes = tuple(
        jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding_for(mesh, variable.get_metadata("axes"))
        )
        for leaf, (_, variable) in zip(leaves, flat, strict=True)
    )
    return AbstractModel(
        config=config,
        graph=graph,
        tree=tree,
        names=names,
        shapes=shapes,
        is_tied=config.is_tied,
    )


def load_params(
    model: AbstractModel, checkpoint: Checkpoint, report: Callable[[int, int], None]
) -> tuple[jax.Array, ...]:
    """Reads every parameter; each device's part is read alone. `report` gets (done, all).

    Raises WeightError for a parameter that the checkpoint lacks, a tensor that no parameter uses,
    or a shape that differs.
    """
    _check_names(model, checkpoint)
    params = []
    for done, (name, shape) in enumerate(zip(model.names, model.shapes, strict=True)):
        params.append(_load(name, shape, checkpoint))
        report(done + 1, len(model.names))
    return tuple(params)


def dummy_params(model: AbstractModel, seed: int) -> tuple[jax.Array, ...]:
    """Returns random parameters, for measuring without a checkpoint."""
    random = np.random.default_rng(seed)

    def make(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        is_norm = len(shape.shape) == 1
        scale = 0.02 if not is_norm else 0.0
        values = random.standard_normal(shape.shape, np.float32) * scale + float(is_norm)
        return jax.device_put(values.astype(shape.dtype), shape.sharding)

    return tuple(make(*item) for item in zip(model.names, model.shapes, strict=True))


def _check_names(model: AbstractModel, checkpoint: Checkpoint) -> None:
    wanted, found = set(model.names), set(checkpoint.names)
    # A tied checkpoint may store the head again; old ones store rope's frequencies.
    spare = {name for name in found - wanted if name.endswith("rotary_emb.inv_freq")}
    if model.is_tied:
        spare.add("lm_head.weight")
    for kind, names in (
        ("lacks the parameter", wanted - found),
        ("holds a tensor that the model does not use:", found - wanted - spare),
    ):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise WeightError(f"the checkpoint {kind} {first} ({len(names)} in all)")
    for name, shape in zip(model.names, model.shapes, strict=True):
        if checkpoint.shape(name) != shape.shape:
            raise WeightError(
                f"{name} has shape {checkpoint.shape(name)}; config.json asks for {shape.shape}"
            )


def _load(name: str, shape: jax.ShapeDtypeStruct, checkpoint: Checkpoint) -> jax.Array:
    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        return checkpoint.read(name, index).astype(shape.dtype)

    return jax.make_array_from_callback(shape.shape, shape.sharding, read)
