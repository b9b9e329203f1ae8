"""Prints what `jaxserve plan` finds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import jax

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError, WeightError
from jaxserve.mesh import parse_mesh
from jaxserve.models.checkpoint import open_checkpoint, resolve_config
from jaxserve.models.loading import Formats, stored_formats
from jaxserve.options import PlanOptions
from jaxserve.planning.plan import (
    FindDevices,
    Plan,
    alternatives,
    decode_bound,
    estimates,
    plan_for,
    prefill_bound,
)
from jaxserve.planning.targets import TARGETS, devices_of

_GIB = 2**30
_MOST_DEVICES = 16  # that a recommendation looks at, unless more are asked for


def run_plan(
    config: EngineConfig, options: PlanOptions, *, find_devices: FindDevices = devices_of
) -> int:
    """Prints the plan of a model; returns 0 where it fits, else 1."""
    jax.config.update("jax_platforms", "cpu")  # what is planned for may be here and in use
    path = resolve_config(config.model, revision=config.revision)
    with open_checkpoint(path, has_weights=False) as checkpoint:
        hf_config, formats = checkpoint.config, stored_formats(checkpoint)
    finding: dict[str, Any] = {"formats": formats, "find_devices": find_devices}
    if options.recommend:
        for line in recommend_lines(config, hf_config, **finding):
            print(line, flush=True)
        return 0
    print(f"compiling for {options.device}, which takes a minute or more", file=sys.stderr)
    plan = plan_for(config, hf_config, options.device, **finding)
    for line in plan_lines(plan):
        print(line)
    if plan.refusal is None:
        return 0
    print("it would fit with:")
    for flags in alternatives(config, hf_config, options.device, **finding):
        print(f"  {flags}")
    return 1


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yields the lines of a report."""
    engine, memory = plan.engine, plan.memory
    limits = engine.settings.limits
    verdict = "fits" if plan.refusal is None else f"does not fit: {plan.refusal}"
    yield (
        f"{engine.model.num_params / 1e9:.2f}B parameters on {engine.mesh.size} {plan.device}, "
        f"mesh {engine.shape} ({engine.shape.axes}): {verdict}"
    )
    experts, products = engine.settings.experts, engine.settings.products
    yield (
        f"{engine.dtypes.weights.name} weights (quantised: {engine.model.quantization}), "
        f"{engine.dtypes.kv_cache.name} KV, attention {engine.settings.attention.backend}"
        f"{'' if experts is None else f', experts {experts.backend}'}"
        f"{'' if products is None else f', quantised products {products.backend}'}"
    )
    for warning in engine.settings.warnings:
        yield f"warning: {warning}"
    yield ""
    yield f"{'on each device':37} {'GiB':>8}"
    for name, size in (
        ("weights", memory.weights),
        (f"KV cache, {plan.num_pages} pages of {limits.page_size} tokens", memory.cache),
        (f"state of {limits.num_slots} slots", memory.slots),
        (f"largest step, {plan.num_tokens} tokens", memory.temporaries),
        ("needed", memory.total),
        ("there", memory.limit),
    ):
        yield f"  {name:35} {size / _GIB:8.2f}"
    if plan.refusal is None:
        yield from _capacity_lines(plan)
        yield from _collective_lines(plan)


def _capacity_lines(plan: Plan) -> Iterator[str]:
    limits = plan.engine.settings.limits
    yield ""
    yield f"KV cache of all {limits.num_ranks} ranks: {plan.cache_tokens:,} tokens"
    yield ""
    yield "at most (what memory, multiplication and links allow together):"
    yield f"  {'context':>8} {'sequences':>10} {'tok/s':>10} {'ms/token':>9} {'one, tok/s':>11}"
    for length in (1024, 4096, 16384, 65536, 131072):
        if length > limits.max_model_len:
            break
        count = plan.num_sequences(length)
        if not count:
            continue
        seconds = decode_bound(plan, max(1, count // limits.num_ranks), length).seconds
        alone = 1 / decode_bound(plan, 1, length).seconds
        yield (
            f"  {length:8,} {count:10,} {count / seconds:10,.0f} {1e3 * seconds:9.2f} "
            f"{alone:11,.0f}"
        )
    seconds = prefill_bound(plan).seconds
    rate = plan.num_tokens * limits.num_ranks / seconds
    yield f"  prefill {rate:,.0f} tok/s, in steps of {plan.num_tokens} tokens for each rank"


def _collective_lines(plan: Plan) -> Iterator[str]:
    always = [(what, count) for what, count in plan.collectives.items() if what.is_always]
    yield ""
    if not plan.collectives:
        yield "no device sends anything to another"
        return
    yield f"in each step of {plan.num_tokens} tokens, every device takes part in:"
    for what, count in sorted(always, reverse=True):
        yield (
            f"  {count:4} {what.kind} of {what.num_bytes / 2**20:.2f} MiB "
            f"among {what.group_size} devices"
        )
    if others := sum(plan.collectives.values()) - sum(count for _, count in always):
        yield f"  and up to {others} small ones, by the sampling options in use"


def recommend_lines(
    config: EngineConfig,
    hf_config: dict[str, Any],
    *,
    formats: Formats | None = None,  # of what the checkpoint holds quantised
    find_devices: FindDevices = devices_of,
) -> Iterator[str]:
    """Yields the best mesh of each kind and number of devices; nothing is compiled."""
    length = min(4096, config.max_model_len if isinstance(config.max_model_len, int) else 4096)
    yield f"estimates, not compiled; at a context of {length}; ask for one with --device and --mesh"
    yield (
        f"{'device':7} {'number':>6} {'mesh':>6} {'sequences':>10} {'tok/s':>10} "
        f"{'each device':>11} {'one alone':>10}"
    )
    for device in TARGETS:
        try:
            for count in _counts(device, parse_mesh(config.mesh).num_devices):
                devices = find_devices(device, count)
                plans = estimates(config, hf_config, device, devices, formats=formats)
                yield _best_line(device, count, plans, length)
        except (ConfigError, WeightError) as error:  # such as a compiler that is not installed
            yield f"{device:7} {error}"


def _counts(device: str, least: int) -> list[int]:
    """Returns the numbers of devices to look at, from `least` on."""
    sizes = [size for size in sorted(TARGETS[device].topologies) if size >= least]
    # Where none is so large, looking for `least` says so.
    return [size for size in sizes if size <= _MOST_DEVICES] or sizes[:1] or [least]


def _best_line(device: str, count: int, plans: list[Plan], length: int) -> str:
    fitting = [plan for plan in plans if plan.num_sequences(length)]
    if not fitting:
        return f"{device:7} {count:6}  does not fit"
    best = max(fitting, key=lambda plan: _rate(plan, length))
    alone = 1 / decode_bound(best, 1, length).seconds
    return (
        f"{device:7} {count:6} {best.engine.shape!s:>6} {best.num_sequences(length):10,} "
        f"{_rate(best, length):10,.0f} {_rate(best, length) / count:11,.0f} {alone:10,.0f}"
    )


def _rate(plan: Plan, length: int) -> float:
    """Returns the tokens a second that sequences of a length get together, at most."""
    count = plan.num_sequences(length)
    rows = max(1, count // plan.engine.settings.limits.num_ranks)
    return count / decode_bound(plan, rows, length).seconds
