"""What `jaxserve plan` finds: whether a model fits devices, how much it holds, and how fast it is.

The step is compiled by the devices' own compiler, as the engine would; what it reports is added
up. Speeds are bounds: what the devices could do if they did nothing but read, multiply and send.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.abstract import AbstractEngine, abstract_engine
from jaxserve.engine.settings import num_pages_for
from jaxserve.errors import ConfigError, WeightError
from jaxserve.mesh import parse_mesh
from jaxserve.models.loading import AbstractModel
from jaxserve.models.quantizing import num_bytes
from jaxserve.planning.collectives import Collective, collectives_of
from jaxserve.planning.targets import TARGETS, Target, compiler_options, devices_of


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


def plan_for(config: EngineConfig, hf_config: dict[str, Any], device: str) -> Plan:
    """Compiles a model's largest step for a device and returns what it takes.

    Raises ConfigError or WeightError for what cannot be built at all.
    """
    shape = parse_mesh(config.mesh)
    engine = abstract_engine(config, hf_config, devices=devices_of(device, shape.num_devices))
    temporaries, text, refusal = 0, "", None
    try:
        lowered = engine.lower(engine.buckets[-1], engine.settings.limits.pages_per_sequence)
        compiled = lowered.compile(compiler_options=compiler_options(device))
    except Exception as error:  # the compiler's own; it knows only what one program needs
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).splitlines()[0]
    else:
        text = compiled.as_text() or ""
        sizes: Any = compiled.memory_analysis()
        temporaries = sizes.temp_size_in_bytes + _kept_bytes(sizes)
    return _plan_of(config, engine, device, temporaries, collectives_of(text), refusal)


def _plan_of(
    config: EngineConfig,
    engine: AbstractEngine,
    device: str,
    temporaries: int,
    collectives: Counter[Collective],
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
        collectives=collectives,
        refusal=refusal,
    )


def _kept_bytes(sizes: Any) -> int:
    """Returns what a program returns beside the state that it wrote in place."""
    return max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes)


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
    layers = _device_size(model, 2) - embedding * (1 if model.is_tied else 2)
    experts = _device_size(model, 3)
    share = config.experts_per_token / config.num_experts if experts else 1.0  # of a token
    pair_products = 2 * config.head_dim * config.num_heads // parts * settings.num_layers
    products = (layers + experts * share) * tokens + embedding * rows + pair_products * pairs
    # An embedding that is not the head is read row by row, and experts when a token wants them.
    rest = 0 if model.is_tied else embedding * engine.dtypes.weights.itemsize
    rest += _expert_bytes(model) * (1 - share) ** tokens
    read = model.device_bytes - rest + cached * settings.page_bytes / settings.limits.page_size
    sums = (2 * settings.num_layers + 1) * tokens * config.hidden_size
    sent = 2 * (parts - 1) / parts * sums * engine.dtypes.activations.itemsize
    is_8bit = model.quantization in ("int8", "float8_e4m3fn")
    return Bound(
        memory=read / target.memory_rate,
        compute=2 * products / (target.flops_8bit if is_8bit else target.flops),
        links=sent / target.link_rate,
    )


def _device_size(model: AbstractModel, num_dims: int) -> int:
    """Returns the weights of matrices (2) or stacks of experts' (3) on each device."""
    return sum(
        math.prod(parameter.dense.sharding.shard_shape(parameter.dense.shape))
        for parameter in model.parameters
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
    config = engine.model.config
    windows = getattr(config, "windows", None) or [getattr(config, "sliding_window", None)]
    return sum(min(length, window or length) for window in windows) / len(windows)


def estimates(
    config: EngineConfig, hf_config: dict[str, Any], device: str, count: int
) -> Iterator[Plan]:
    """Yields plans of every mesh of `count` devices that fits the model; nothing is compiled.

    Temporaries are estimated.
    """
    devices = devices_of(device, count)
    for tensor in range(count, 0, -1):
        if count % tensor:
            continue
        try:
            wanted = dataclasses.replace(config, mesh=f"{count // tensor}x{tensor}")
            engine = abstract_engine(wanted, hf_config, devices=devices)
        except (ConfigError, WeightError):
            continue
        temporaries = _estimated_temporaries(engine)
        yield _plan_of(wanted, engine, device, temporaries, Counter())


def alternatives(config: EngineConfig, hf_config: dict[str, Any], device: str) -> Iterator[str]:
    """Yields flags with which a model that does not fit would, on the fewest devices that do."""
    asked = parse_mesh(config.mesh).num_devices
    counts = [count for count in sorted(TARGETS[device].topologies) if count >= asked]
    for count in counts:
        has_found = False
        for quantization in dict.fromkeys((config.quantization, "int8", "int4")):
            wanted: dict[str, Any] = {"quantization": quantization}
            for plan in estimates(dataclasses.replace(config, **wanted), hf_config, device, count):
                if plan.refusal is None:
                    flag = "" if quantization == "auto" else f" --quantization {quantization}"
                    yield f"--mesh {plan.engine.shape}{flag}"
                    has_found = True
                    break
        if has_found:
            return


def _estimated_temporaries(engine: AbstractEngine) -> int:
    """Returns about what the largest step needs: two layers' activations, three of logits."""
    config, settings = engine.model.config, engine.settings
    tokens, rows = engine.buckets[-1]
    parts = engine.shape.rank_devices
    widths = 4 * config.hidden_size + 3 * config.ffw_size // parts
    widths += 4 * config.num_heads * config.head_dim // parts
    activations = tokens * widths * engine.dtypes.activations.itemsize
    return 2 * activations + 3 * rows * settings.vocab_part * 4
