"""An engine without numbers: everything that is decided and compiled before weights are read.

Its devices need not be there: a compiler and their description are enough to compile for them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import EngineConfig
from jaxserve.engine.runner import Bucket, buckets_for, lower_step
from jaxserve.engine.settings import Dtypes, Settings, dtypes_for, settings_for
from jaxserve.engine.step import RANK, StepSpec, init_state, state_specs
from jaxserve.mesh import MeshShape, mesh_for, num_parts, parse_mesh
from jaxserve.models.loading import AbstractModel, Formats, abstract_model, config_of


@dataclass(frozen=True, kw_only=True)
class AbstractEngine:
    """A model's shapes on a mesh, and every size but the number of pages."""

    model: AbstractModel
    dtypes: Dtypes
    settings: Settings
    shape: MeshShape
    mesh: Mesh
    spec: StepSpec

    @property
    def device(self) -> jax.Device:
        """The first of the mesh; all are alike."""
        return self.mesh.devices.flat[0]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The (tokens, rows) of every program, of one rank."""
        limits = self.settings.limits
        return buckets_for(limits.max_step_tokens, limits.num_slots, self.settings.min_rows)

    @property
    def slot_bytes(self) -> int:
        """The bytes that stay on each device between steps, pages aside."""
        state = dataclasses.replace(self.state(1), cache=())
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(state)
        )

    def init_state(
        self,
        num_pages: int,  # of each rank
    ) -> Any:  # DeviceState
        """Returns one device's part of the state of an idle engine."""
        settings = self.settings
        return init_state(
            settings.limits, settings.layout, settings.num_layers, num_pages, settings.vocab_part
        )

    def state(
        self,
        num_pages: int,  # of each rank
    ) -> Any:
        """Returns the shapes of all devices' state, a DeviceState of ShapeDtypeStructs."""

        def whole(spec: PartitionSpec, parts: Any) -> Any:
            sharding = NamedSharding(self.mesh, spec)
            num_devices = num_parts(self.mesh, "rank") if spec == RANK else self.mesh.size

            def all_parts(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
                shape = (leaf.shape[0] * num_devices, *leaf.shape[1:])
                return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

            return jax.tree.map(all_parts, parts)

        parts = jax.eval_shape(functools.partial(self.init_state, num_pages))
        return jax.tree.map(whole, state_specs(self.mesh), parts)

    def lower(self, bucket: Bucket, num_pages: int) -> jax.stages.Lowered:
        """Returns the lowered step of one bucket."""
        # Of devices that are not there, kernels take the facts from the mesh.
        with jax.set_mesh(self.mesh):
            return lower_step(self.model, self.spec, self.state(num_pages), bucket)


def abstract_engine(
    config: EngineConfig,
    hf_config: dict[str, Any],
    *,
    formats: Formats | None = None,  # of what the checkpoint holds quantised
    devices: Sequence[jax.Device] | None = None,  # default: those of this machine
) -> AbstractEngine:
    """Returns the engine of a configuration; ConfigError or WeightError for what cannot be."""
    shape = parse_mesh(config.mesh)
    mesh = mesh_for(shape, config_of(hf_config), devices)
    dtypes = dtypes_for(config, mesh.devices.flat[0].platform)
    model = abstract_model(
        hf_config,
        mesh,
        dtype=dtypes.weights,
        activation_dtype=dtypes.activations,
        quantization=config.quantization,
        formats=formats,
        uses_kernels=config.attention_backend != "reference",
    )
    settings = settings_for(config, model, dtypes, mesh)
    spec = StepSpec(
        mesh=mesh,
        limits=settings.limits,
        max_logprobs=(
            model.config.vocab_size if config.max_logprobs == -1 else config.max_logprobs
        ),
        attention=settings.attention.backend,
        experts="reference" if settings.experts is None else settings.experts.backend,
        is_gathered=jax.process_count() > 1,  # devices that are not here count as one process's
    )
    return AbstractEngine(
        model=model, dtypes=dtypes, settings=settings, shape=shape, mesh=mesh, spec=spec
    )
