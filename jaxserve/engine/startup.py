"""What every process of an engine does before it is ready: load, compile, hold.

Processes that run a model together agree here on all that shapes their programs.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxserve.config import EngineConfig, compile_cache_path
from jaxserve.engine.abstract import AbstractEngine, abstract_engine
from jaxserve.engine.executables import ExecutableStore, private_directory
from jaxserve.engine.info import EngineInfo, Report
from jaxserve.engine.kv_scales import kv_scales_for, with_scales
from jaxserve.engine.peers import Peers, difference, differing
from jaxserve.engine.runner import Publish, Runner, compile_programs
from jaxserve.engine.settings import (
    device_line,
    eos_tokens_of,
    num_pages_for,
    temporary_bytes_of,
)
from jaxserve.engine.step import DeviceState, state_specs
from jaxserve.errors import ConfigError
from jaxserve.mesh import local_device, num_processes
from jaxserve.models.checkpoint import open_checkpoint, resolve
from jaxserve.models.loading import dummy_params, load_params, stored_formats
from jaxserve.models.quantizing import ProductsChoice
from jaxserve.ops.moe import ExpertsChoice


@dataclass(frozen=True, kw_only=True)
class Started:
    """A model on its devices with every program held, ready to run steps."""

    engine: AbstractEngine
    eos_tokens: tuple[int, ...]
    num_pages: int  # of each rank
    runner: Runner
    info: EngineInfo


def start(
    config: EngineConfig,
    report: Report,
    *,
    peers: Peers | None = None,  # the other processes, where several run the model
    publish: Publish | None = None,
) -> Started:
    """Loads a model and compiles its programs. Raises ConfigError or WeightError."""
    started_s = time.monotonic()
    cache_dir = _use_compile_cache(compile_cache_path(config), is_alone=peers is None)
    loaded = _load(config, report, peers)
    engine, limits = loaded.engine, loaded.engine.settings.limits
    num_pages = _num_pages(config, engine)
    if peers is not None:
        num_pages = min(peers.exchange(num_pages))
    runner = _make_runner(loaded, num_pages, cache_dir, report=report, peers=peers, publish=publish)
    info = EngineInfo(
        model=config.model,
        max_model_len=limits.max_model_len,
        vocab_size=engine.model.config.vocab_size,
        max_logprobs=engine.spec.max_logprobs,
        max_num_seqs=limits.num_slots * limits.num_ranks,
        max_num_batched_tokens=limits.max_step_tokens,
        page_size=limits.page_size,
        num_pages=num_pages * limits.num_ranks,
        num_slots=limits.num_slots * limits.num_ranks,
        eos_tokens=loaded.eos_tokens,
        max_waiting=engine.settings.max_waiting,
        scheduling_policy=config.scheduling_policy,
        enable_prefix_caching=config.enable_prefix_caching,
        quantization=engine.model.quantization,
        kv_cache_dtype=engine.dtypes.kv_cache.name,
        mesh=str(engine.shape),
        num_processes=num_processes(engine.mesh),
        device=device_line(engine.device),
        dtype=engine.dtypes.weights.name,
        attention=engine.settings.attention.backend,
        experts=_backend_of(engine.settings.experts),
        products=_backend_of(engine.settings.products),
        num_programs=runner.num_programs,
        ready_s=time.monotonic() - started_s,
    )
    report(_ready_line(info))
    return Started(
        engine=engine,
        eos_tokens=loaded.eos_tokens,
        num_pages=num_pages,
        runner=runner,
        info=info,
    )


def _backend_of(choice: ExpertsChoice | ProductsChoice | None) -> str:
    return "none" if choice is None else choice.backend


def _ready_line(info: EngineInfo) -> str:
    experts = "" if info.experts == "none" else f"experts {info.experts}, "
    products = "" if info.products == "none" else f"quantised products {info.products}, "
    where = f", {info.num_processes} processes" if info.num_processes > 1 else ""
    return (
        f"ready in {info.ready_s:.1f} s: {info.device}, {info.dtype} weights "
        f"(quantised: {info.quantization}), {info.kv_cache_dtype} KV, "
        f"attention {info.attention}, {experts}{products}mesh {info.mesh}{where}, "
        f"{info.num_pages} pages of {info.page_size} tokens, {info.num_slots} slots, "
        f"{info.num_programs} programs"
    )


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A model on its devices."""

    engine: AbstractEngine
    params: tuple[jax.Array, ...]
    eos_tokens: tuple[int, ...]
    kv_scales: np.ndarray | None  # [layers, 2, kv_heads, head_dim] f32, of keys and values


def _load(config: EngineConfig, report: Report, peers: Peers | None) -> _Loaded:
    """Reads the checkpoint onto the devices."""
    is_dummy = config.load_format == "dummy"
    path = resolve(config.model, revision=config.revision)
    with open_checkpoint(path, has_weights=not is_dummy) as checkpoint:
        engine = abstract_engine(config, checkpoint.config, formats=stored_formats(checkpoint))
        model = engine.model
        _check_processes(engine, peers)
        if peers is not None:
            _agree(peers, engine)
        for warning in engine.settings.warnings:
            report(f"warning: {warning}")
        report(f"loading {config.model}: {model.num_params / 1e6:.0f}M parameters")
        if is_dummy:
            params = dummy_params(model, config.seed)
        else:
            params = load_params(model, checkpoint, progress(report, "loading"))
        if peers is not None:
            peers.exchange("loaded")  # what runs on all devices must not wait for a slow disk
        return _Loaded(
            engine=engine,
            params=params,
            eos_tokens=eos_tokens_of(checkpoint.config, checkpoint.generation_config),
            kv_scales=kv_scales_for(model, params, checkpoint, engine.dtypes.kv_cache),
        )


def _check_processes(engine: AbstractEngine, peers: Peers | None) -> None:
    """Raises `ConfigError` for processes without a plan, or without a part of the mesh."""
    count, held = jax.process_count(), num_processes(engine.mesh)
    if count > 1 and peers is None:
        raise ConfigError(
            f"jax.distributed runs {count} processes here; of jaxserve only `jaxserve serve` runs "
            "a model in several"
        )
    if held < count:
        raise ConfigError(
            f"mesh {engine.shape} takes the devices of {held} of {count} processes; each must hold "
            f"a part: there are {jax.device_count()} devices"
        )


def _agree(peers: Peers, engine: AbstractEngine) -> None:
    """Checks that all processes make the same programs. Raises `ConfigError`, naming the first."""
    facts = {
        "model config": repr(engine.model.config),
        "dtypes": ", ".join(f"{name} {dtype}" for name, dtype in vars(engine.dtypes).items()),
        "limits": repr(engine.settings.limits),
        "attention": repr(engine.settings.attention.layout),
        "experts": repr(engine.settings.experts),
        "products": repr(engine.settings.products),
        "quantization": engine.model.quantization,
        "device": local_device(engine.mesh).device_kind,
    }
    facts_of_all = peers.exchange(facts)
    for process_id, theirs in enumerate(facts_of_all):
        if (name := differing(theirs, facts_of_all[0])) is not None:
            reason = difference(name, theirs, facts_of_all[0])
            raise ConfigError(f"process {process_id} does not fit: {reason}")


def _num_pages(config: EngineConfig, engine: AbstractEngine) -> int:
    """Returns how many pages of each rank fit beside weights and the largest program's rest."""
    memory_bytes = (local_device(engine.mesh).memory_stats() or {}).get("bytes_limit")
    temporary_bytes = 0
    if memory_bytes is not None:
        limits = engine.settings.limits
        lowered = engine.lower(engine.buckets[-1], limits.pages_per_sequence)
        temporary_bytes = temporary_bytes_of(lowered.compile())
    return num_pages_for(
        config,
        engine.settings,
        num_devices=engine.mesh.size // num_processes(engine.mesh),
        memory_bytes=memory_bytes,
        model_bytes=engine.model.device_bytes + engine.slot_bytes,
        temporary_bytes=temporary_bytes,
    )


def _make_runner(
    loaded: _Loaded,
    num_pages: int,
    cache_dir: Path | None,
    *,
    report: Report,
    peers: Peers | None,
    publish: Publish | None,
) -> Runner:
    engine = loaded.engine
    store = None
    if cache_dir is not None:
        store = ExecutableStore(
            cache_dir,
            list(engine.mesh.devices.flat),
            engine.model.config,
            engine.model.parameters,  # quantised or not, and how they are multiplied
            engine.dtypes,
            engine.spec,
            num_pages,
        )
        store.prune()
    state = _initial_state(loaded, num_pages)
    runner = Runner(spec=engine.spec, params=loaded.params, state=state, publish=publish)
    buckets = engine.buckets
    report(
        f"compiling {len(buckets)} programs (a first start takes a minute or more, later seconds)"
    )
    advance = progress(report, "compiling")
    programs = compile_programs(
        engine.model, engine.spec, engine.state(num_pages), buckets, store=store, peers=peers
    )
    for bucket, program in programs:
        runner.hold(bucket, program)
        advance(runner.num_programs, len(buckets))
    return runner


def _initial_state(loaded: _Loaded, num_pages: int) -> DeviceState:
    engine = loaded.engine
    on_mesh = jax.shard_map(
        functools.partial(engine.init_state, num_pages),
        mesh=engine.mesh,
        in_specs=(),
        out_specs=state_specs(engine.mesh),
    )
    state: DeviceState = jax.jit(on_mesh)()
    if loaded.kv_scales is None:
        return state
    return dataclasses.replace(state, cache=with_scales(state.cache, loaded.kv_scales))


def _use_compile_cache(path: Path | None, *, is_alone: bool) -> Path | None:
    """Turns on what makes a restart quick. Returns the folder for executables, None for none.

    A CPU executable that XLA loads from its own cache cannot be serialised again (its functions
    are missing when it is loaded the second time): there, our store works alone, and a cache that
    the user set for JAX turns it off. Of several processes only the first would write XLA's, and
    who compiles may wait for all others to compile, too: there, our store works alone as well.
    """
    if path is None:
        return None
    is_cpu = jax.default_backend() == "cpu"
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        if is_cpu:
            return None
    elif not is_cpu and is_alone:
        jax.config.update("jax_compilation_cache_dir", str(private_directory(path / "xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return private_directory(path) / "programs"


def progress(report: Report, verb: str) -> Callable[[int, int], None]:
    """Returns a callback for (done, all) that reports about every second and at the end.

    The first few say nothing of the time left: they are done side by side and end together.
    """
    started_s = last_s = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if done < total and now_s - last_s < 1.0:
            return
        last_s = now_s
        elapsed_s = now_s - started_s
        left_s = elapsed_s / done * (total - done)
        rest = f", about {left_s:.0f} s left" if total // 4 < done < total else ""
        bar = "#" * (20 * done // total)
        report(f"{verb} [{bar:<20}] {done}/{total} in {elapsed_s:.1f} s{rest}")

    return advance
