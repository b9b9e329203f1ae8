"""What `jaxserve plan` finds: whether a model fits devices, how much it holds, and how fast it is.

The step is compiled by the devices' own compiler, as the engine would; what it reports is added
up. Speeds are bounds: what the devices could do if they did nothing but read, multiply and send.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.abstract import AbstractEngine, abstract_engine
from jaxserve.engine.settings import num_pages_for, temporary_bytes_of
from jaxserve.errors import ConfigError, WeightError
from jaxserve.mesh import MeshShape, parse_mesh
from jaxserve.models.loading import AbstractModel, Formats, Parameter
from jaxserve.models.quantizing import num_bytes
from jaxserve.ops.quantization import Quantized, QuantizedWeight
from jaxserve.planning.collectives import Collective, collectives_of
from jaxserve.planning.targets import TARGETS, Target, compiler_options, devices_of

# Devices by their kind and least number; ConfigError where there are none.
FindDevices: TypeAlias = Callable[[str, int], Sequence[jax.Device]]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device."""

    limit: int  # what the compiler lets a program use
    weights: int
    cache: int  # the pages
    slots: int  # what else stays between steps
    temporaries: int  # of the largest step, and what it returns

    @property
    def total(self) -> int:
        """What the largest step needs."""
        return self.weights + self.cache + self.slots + self.temporaries


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model on devices."""

    engine: AbstractEngine
    device: str  # of TARGETS
    memory: Memory
    num_pages: int  # of each rank; 0 where not one request fits
    num_tokens: int  # of the largest step of each rank
    collectives: Counter[Collective]  # of that step
    refusal: str | None  # why it does not fit

    @property
    def target(self) -> Target:
        """What is known of the device."""
        return TARGETS[self.device]

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values fit, all ranks together."""
        limits = self.engine.settings.limits
        return self.num_pages * limits.page_size * limits.num_ranks

    def num_sequences(self, length: int) -> int:
        """Returns how many sequences of `length` tokens can be computed at once."""
        limits = self.engine.settings.limits
        pages = -(-length // limits.page_size)
        return min(self.num_pages // pages, limits.num_slots) * limits.num_ranks


def plan_for(
    config: EngineConfig,
    hf_config: dict[str, Any],
    device: str,  # of TARGETS
    *,
    formats: Formats | None = None,  # of what the checkpoint holds quantised
    find_devices: FindDevices = devices_of,
) -> Plan:
    """Compiles a model's largest step for a device and returns what it takes.

    Raises ConfigError or WeightError for what cannot be built at all.
    """
    shape = parse_mesh(config.mesh)
    devices = find_devices(device, shape.num_devices)
    engine = abstract_engine(config, hf_config, formats=formats, devices=devices)
    temporaries, text, refusal = 0, "", None
    try:
        lowered = engine.lower(engine.buckets[-1], engine.settings.limits.pages_per_sequence)
        compiled = lowered.compile(compiler_options=compiler_options(device))
    except Exception as error:  # the compiler's own; it knows only what one program needs
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).splitlines()[0]
    else:
        text, temporaries = compiled.as_text() or "", temporary_bytes_of(compiled)
    return _plan_of(
        config,
        engine,
        device,
        temporaries=temporaries,
        collectives=collectives_of(text),
        refusal=refusal,
    )


def _plan_of(
    config: EngineConfig,
    engine: AbstractEngine,
    device: str,
    *,
    temporaries: int,
    collectives: Counter[Collective] | None = None,
    refusal: str | None = None,
) -> Plan:
    """Returns the plan of an engine whose largest step needs `temporaries` bytes."""
    num_pages = 0
    try:
        num_pages = num_pages_for(
            config,
            engine.settings,
            num_devices=engine.mesh.size,
            memory_bytes=TARGETS[device].memory_bytes,
            model_bytes=engine.model.device_bytes + engine.slot_bytes,
            temporary_bytes=temporaries,
        )
    except ConfigError as error:
        refusal = refusal or str(error)
    memory = Memory(
        limit=TARGETS[device].memory_bytes,
        weights=engine.model.device_bytes,
        cache=num_pages * engine.settings.page_bytes,
        slots=engine.slot_bytes,
        temporaries=temporaries,
    )
    if refusal is None and memory.total > memory.limit:
        refusal = f"{memory.total / 2**30:.2f} GiB are needed on each device"
    return Plan(
        engine=engine,
        device=device,
        memory=memory,
        num_pages=num_pages,
        num_tokens=engine.buckets[-1][0],
        collectives=collectives or Counter(),
        refusal=refusal,
    )


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The least time of a step, in seconds, by what takes it."""

    memory: float
    compute: float
    links: float

    @property
    def seconds(self) -> float:
        """Reading overlaps multiplying; what is sent is waited for."""
        return max(self.memory, self.compute) + self.links


def decode_bound(
    plan: Plan,
    rows: int,  # sequences of each rank
    length: int,  # tokens of each
) -> Bound:
    """Returns the least time of a step that gives each sequence a token."""
    seen = rows * _seen(plan.engine, length)
    return _bound(plan, tokens=rows, rows=rows, cached=seen, pairs=seen)


def prefill_bound(plan: Plan) -> Bound:
    """Returns the least time of the largest step, when it computes the start of one prompt."""
    tokens = plan.num_tokens
    seen = _seen(plan.engine, tokens)
    return _bound(plan, tokens=tokens, rows=1, cached=0.0, pairs=tokens * seen / 2)


def _bound(
    plan: Plan,
    *,
    tokens: int,  # that each rank computes
    rows: int,  # of logits
    cached: float,  # tokens whose keys and values each rank reads
    pairs: float,  # of a query and a key
) -> Bound:
    engine, target = plan.engine, plan.target
    model, settings, parts = engine.model, engine.settings, engine.shape.rank_devices
    config = model.config
    embedding = model.vocab_size * config.hidden_size // parts  # and head, as large
    layers = _device_size(model.parameters, 2) - embedding * (1 if model.is_tied else 2)
    experts = _device_size(model.parameters, 3)
    share = config.experts_per_token / config.num_experts if experts else 1.0  # of a token
    pair_products = 2 * config.head_dim * config.num_heads // parts * settings.num_layers
    products = (layers + experts * share) * tokens + embedding * rows + pair_products * pairs
    # An embedding that is not the head is read row by row, and experts when a token wants them.
    rest = 0 if model.is_tied else embedding * engine.dtypes.weights.itemsize
    rest += _expert_bytes(model) * (1 - share) ** tokens
    read = model.device_bytes - rest + cached * settings.page_bytes / settings.limits.page_size
    sums = (2 * settings.num_layers + 1) * tokens * config.hidden_size
    sent = 2 * (parts - 1) / parts * sums * engine.dtypes.activations.itemsize
    in_8bit = [one for one in model.parameters if _multiplies_in_8bit(one, engine)]
    fast = (_device_size(in_8bit, 2) + _device_size(in_8bit, 3) * share) * tokens
    return Bound(
        memory=read / target.memory_rate,
        compute=2 * ((products - fast) / target.flops + fast / target.flops_8bit),
        links=sent / target.link_rate,
    )


def _multiplies_in_8bit(parameter: Parameter, engine: AbstractEngine) -> bool:
    """Returns whether activations are quantised, too: else a weight becomes floats to multiply."""
    value, experts = parameter.value, engine.settings.experts
    if not isinstance(value, QuantizedWeight) or not isinstance(value.form, Quantized):
        return False
    # Experts' kernels read quantised weights, and multiply floats.
    is_expert = len(parameter.dense.shape) == 3
    return not is_expert or experts is None or experts.backend == "reference"


def _device_size(parameters: Iterable[Parameter], num_dims: int) -> int:
    """Returns the weights of matrices (2) or stacks of experts' (3) on each device."""
    return sum(
        math.prod(parameter.dense.sharding.shard_shape(parameter.dense.shape))
        for parameter in parameters
        if len(parameter.dense.shape) == num_dims
    )


def _expert_bytes(model: AbstractModel) -> int:
    return sum(
        num_bytes(leaf)
        for parameter in model.parameters
        if len(parameter.dense.shape) == 3
        for leaf in jax.tree.leaves(parameter.value)
    )


def _seen(engine: AbstractEngine, length: int) -> float:
    """Returns how many of `length` tokens a layer reads, windows counted, on average."""
    windows = engine.model.config.windows
    return sum(min(length, window or length) for window in windows) / len(windows)


def estimates(
    config: EngineConfig,
    hf_config: dict[str, Any],
    device: str,  # of TARGETS
    devices: Sequence[jax.Device],  # of that kind
    *,
    formats: Formats | None = None,  # of what the checkpoint holds quantised
) -> list[Plan]:
    """Returns plans of every mesh of these devices that fits the model; nothing is compiled.

    Temporaries are estimated. Raises ConfigError or WeightError where none can be built.
    """
    plans: list[Plan] = []
    refusal: ConfigError | WeightError | None = None
    for shape in _shapes(len(devices)):
        wanted = dataclasses.replace(config, mesh=str(shape))
        try:
            engine = abstract_engine(wanted, hf_config, formats=formats, devices=devices)
        except (ConfigError, WeightError) as error:
            refusal = error
            continue
        plans.append(_plan_of(wanted, engine, device, temporaries=_estimated_temporaries(engine)))
    if not plans:
        assert refusal is not None, devices
        raise refusal
    return plans


def _shapes(count: int) -> Iterator[MeshShape]:
    """Yields the meshes of `count` devices: large ranks first, in each few groups of experts."""
    for rank_devices in _divisors(count)[::-1]:
        for expert in _divisors(rank_devices):
            yield MeshShape(
                data=count // rank_devices, expert=expert, tensor=rank_devices // expert
            )


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def alternatives(
    config: EngineConfig,
    hf_config: dict[str, Any],
    device: str,  # of TARGETS
    *,
    formats: Formats | None = None,  # of what the checkpoint holds quantised
    find_devices: FindDevices = devices_of,
) -> Iterator[str]:
    """Yields flags with which a model that does not fit would, on the fewest devices that do.

    Types to quantise to at load are among them, unless the checkpoint is quantised already.
    """
    asked = parse_mesh(config.mesh).num_devices
    types = [config.quantization] if formats else [config.quantization, "int8", "int4"]
    larger = {count for count in TARGETS[device].topologies if count > asked}
    for count in sorted({asked, *larger}):
        devices, has_found = find_devices(device, count)[:count], False
        for quantization in dict.fromkeys(types):
            wanted: dict[str, Any] = {"quantization": quantization}
            asked_for = dataclasses.replace(config, **wanted)
            if shape := _fitting_shape(asked_for, hf_config, device, devices, formats=formats):
                flag = "" if quantization == "auto" else f" --quantization {quantization}"
                yield f"--mesh {shape}{flag}"
                has_found = True
        if has_found:
            return


def _fitting_shape(
    config: EngineConfig,
    hf_config: dict[str, Any],
    device: str,
    devices: Sequence[jax.Device],
    *,
    formats: Formats | None,
) -> MeshShape | None:
    """Returns the first mesh that a model fits, None where there is none."""
    try:
        plans = estimates(config, hf_config, device, devices, formats=formats)
    except (ConfigError, WeightError):  # not every model can be quantised to every type
        return None
    return next((plan.engine.shape for plan in plans if plan.refusal is None), None)


def _estimated_temporaries(engine: AbstractEngine) -> int:
    """Returns about what the largest step needs: two layers' activations, three of logits.

    Experts add what the pairs of a token and an expert hold, on each device those of all experts.
    """
    config, settings = engine.model.config, engine.settings
    tokens, rows = engine.buckets[-1]
    parts, itemsize = engine.shape.rank_devices, engine.dtypes.activations.itemsize
    widths = 4 * config.hidden_size + 3 * config.ffw_size // parts
    widths += 4 * config.num_heads * config.head_dim // parts
    size = 2 * tokens * widths * itemsize + 3 * rows * settings.vocab_part * 4
    if config.num_experts:
        pairs, ffw = tokens * config.experts_per_token, config.expert_ffw_size
        # Their rows, what gate and up make of them, and float32 results.
        pair_bytes = (config.hidden_size + 3 * ffw // engine.shape.tensor) * itemsize
        size += pairs * (pair_bytes + config.hidden_size * 4)
    return size
