"""The engine: loads a model, then plans, dispatches and commits steps, one ahead of the device."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxserve.config import EngineConfig, compile_cache_path
from jaxserve.engine.abstract import AbstractEngine, abstract_engine
from jaxserve.engine.executables import ExecutableStore, private_directory
from jaxserve.engine.info import EngineInfo, EngineStats
from jaxserve.engine.kv_scales import kv_scales_for, with_scales
from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix_cache import PrefixCache
from jaxserve.engine.request import Request, Update
from jaxserve.engine.runner import Pending, Runner, compile_programs
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.sequence import StepPlan
from jaxserve.engine.settings import device_line, eos_tokens_of, num_pages_for
from jaxserve.engine.step import DeviceState, state_specs
from jaxserve.models.checkpoint import open_checkpoint, resolve
from jaxserve.models.loading import dummy_params, load_params, stored_formats

Report = Callable[[str], None]

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class EngineCore:
    """Owns the scheduler and the runner of one model. One thread calls it.

    The device never waits for Python: a step is dispatched before the one before it is read.
    """

    def __init__(self, config: EngineConfig, report: Report) -> None:
        started_s = time.monotonic()
        cache_dir = _use_compile_cache(compile_cache_path(config))
        loaded = _load(config, report)
        engine = loaded.engine
        num_pages = _num_pages(config, engine)
        limits = engine.settings.limits
        self._pools = [PagePool(num_pages) for _ in range(limits.num_ranks)]
        self._scheduler = _make_scheduler(config, loaded, self._pools)
        self._runner = _make_runner(loaded, num_pages, cache_dir, report)
        self.max_waiting = engine.settings.max_waiting
        self.info = EngineInfo(
            model=config.model,
            max_model_len=limits.max_model_len,
            vocab_size=engine.model.config.vocab_size,
            max_logprobs=config.max_logprobs,
            max_num_seqs=limits.num_slots * limits.num_ranks,
            max_num_batched_tokens=limits.max_step_tokens,
            page_size=limits.page_size,
            num_pages=num_pages * limits.num_ranks,
            num_slots=limits.num_slots * limits.num_ranks,
            eos_tokens=loaded.eos_tokens,
            scheduling_policy=config.scheduling_policy,
            quantization=engine.model.quantization,
            kv_cache_dtype=engine.dtypes.kv_cache.name,
            mesh=str(engine.shape),
            device=device_line(engine.device),
            dtype=engine.dtypes.weights.name,
            attention=engine.settings.attention.backend,
            num_programs=self._runner.num_programs,
            ready_s=time.monotonic() - started_s,
        )
        self._pending: Pending | None = None
        self._dispatch_s = 0.0  # when the newest step was dispatched
        self._read_s = 0.0  # when the newest read tokens had arrived
        self._host_gap_s = 0.0
        self._step_s = 0.0
        self._queue_s = 0.0
        self._compiles = CompileCounter()
        report(
            f"ready in {self.info.ready_s:.1f} s: {self.info.device}, {self.info.dtype} weights "
            f"(quantised: {self.info.quantization}), {self.info.kv_cache_dtype} KV, "
            f"attention {self.info.attention}, "
            f"mesh {self.info.mesh}, {self.info.num_pages} pages of {limits.page_size} tokens, "
            f"{self.info.num_slots} slots, "
            f"{self.info.num_programs} programs"
        )

    @property
    def has_work(self) -> bool:
        """True while a sequence is unfinished or a step is in flight."""
        return self._scheduler.has_work or self._pending is not None

    @property
    def num_free(self) -> int:
        """Requests that may still come: free slots, and what the queue still holds."""
        scheduler = self._scheduler
        num_slots = self.info.max_num_seqs - scheduler.num_running
        return num_slots + self.max_waiting - scheduler.num_waiting

    def add(self, request: Request) -> None:
        """Queues a request; raises QueueFull, or RequestError for one that cannot ever run."""
        self._scheduler.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forgets requests: their pages are free at once. Unknown ids are ignored."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    def step(self) -> list[Update]:
        """Dispatches the next step, then reads and commits the one before it."""
        previous, self._pending = self._pending, None
        plan = self._scheduler.plan_step()
        if plan is not None:
            self._count_waits(plan, previous)
            self._pending = self._runner.dispatch(plan)
            self._dispatch_s = time.monotonic()
        if previous is None:
            return []
        results = self._runner.read(previous)
        now_s = time.monotonic()
        self._step_s += now_s - max(self._read_s, previous.dispatched_s)
        self._read_s = now_s
        updates = self._scheduler.commit(previous.plan, results)
        if not self.has_work:
            self._scheduler.check_idle()
        return updates

    def stats(self) -> EngineStats:
        """Returns the counters now."""
        scheduler, totals = self._scheduler, self._scheduler.totals
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_pages_free=sum(pool.num_free for pool in self._pools),
            num_pages=self.info.num_pages,
            num_steps=self._runner.num_dispatches,
            prompt_tokens=totals.prompt_tokens,
            generation_tokens=totals.generation_tokens,
            prefix_queries=totals.prefix_queries,
            prefix_hits=totals.prefix_hits,
            num_preemptions=totals.num_preemptions,
            num_finished=dict[str, int](totals.num_finished.items()),
            num_compiles_since_ready=self._compiles.count,
            host_gap_s=self._host_gap_s,
            step_s=self._step_s,
            queue_s=self._queue_s,
        )

    def close(self) -> None:
        """Lets go of the device's memory."""
        self._compiles.close()
        self._pending = None
        self._runner.close()

    def _count_waits(self, plan: StepPlan, previous: Pending | None) -> None:
        """Adds up how long new sequences queued and how long the device may have stood idle.

        A device that still runs the step before does not wait. One that is done has idled at most
        since the tokens before those were read: an upper bound.
        """
        now_s = time.monotonic()
        for sequence in plan.admitted:
            if sequence.request.arrival_s and not sequence.num_preemptions:
                self._queue_s += now_s - sequence.request.arrival_s
        if previous is not None and previous.is_done():
            self._host_gap_s += now_s - max(self._read_s, self._dispatch_s)


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A model on its devices."""

    engine: AbstractEngine
    params: tuple[jax.Array, ...]
    eos_tokens: tuple[int, ...]
    kv_scales: np.ndarray | None  # [layers, 2, kv_heads, head_dim] f32, of keys and values


def _load(config: EngineConfig, report: Report) -> _Loaded:
    """Reads the checkpoint onto the devices."""
    is_dummy = config.load_format == "dummy"
    path = resolve(config.model, revision=config.revision)
    with open_checkpoint(path, has_weights=not is_dummy) as checkpoint:
        engine = abstract_engine(config, checkpoint.config, formats=stored_formats(checkpoint))
        model = engine.model
        if (warning := engine.settings.attention.warning) is not None:
            report(f"warning: {warning}")
        report(f"loading {config.model}: {model.num_params / 1e6:.0f}M parameters")
        if is_dummy:
            params = dummy_params(model, config.seed)
        else:
            params = load_params(model, checkpoint, progress(report, "loading"))
        return _Loaded(
            engine=engine,
            params=params,
            eos_tokens=eos_tokens_of(checkpoint.config, checkpoint.generation_config),
            kv_scales=kv_scales_for(model, params, checkpoint, engine.dtypes.kv_cache),
        )


def _num_pages(config: EngineConfig, engine: AbstractEngine) -> int:
    """Returns how many pages of each rank fit beside weights and the largest program's rest."""
    memory_bytes = (engine.device.memory_stats() or {}).get("bytes_limit")
    temporary_bytes = 0
    if memory_bytes is not None:
        limits = engine.settings.limits
        lowered = engine.lower(engine.buckets[-1], limits.pages_per_sequence)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None, engine.device
        temporary_bytes = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return num_pages_for(
        config,
        engine.settings,
        num_devices=engine.mesh.size,
        memory_bytes=memory_bytes,
        model_bytes=engine.model.device_bytes + engine.slot_bytes,
        temporary_bytes=temporary_bytes,
    )


def _make_scheduler(config: EngineConfig, loaded: _Loaded, pools: Sequence[PagePool]) -> Scheduler:
    settings = loaded.engine.settings
    limits = settings.limits
    return Scheduler(
        pools,
        [PrefixCache(limits.page_size, enabled=config.enable_prefix_caching) for _ in pools],
        num_slots=limits.num_slots,
        max_step_tokens=limits.max_step_tokens,
        max_model_len=limits.max_model_len,
        page_size=limits.page_size,
        # The client counts what waits. Beyond that, free slots may be taken, and preempted
        # sequences come back.
        max_waiting=settings.max_waiting + 2 * limits.num_slots * limits.num_ranks,
        eos_tokens=loaded.eos_tokens,
        max_page_grants=limits.max_grants,
        max_history_tokens=limits.max_history,
        max_wide_admissions=limits.max_wide,
        policy=config.scheduling_policy,
    )


def _make_runner(loaded: _Loaded, num_pages: int, cache_dir: Path | None, report: Report) -> Runner:
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
    runner = Runner(spec=engine.spec, params=loaded.params, state=state)
    buckets = engine.buckets
    report(
        f"compiling {len(buckets)} programs (a first start takes a minute or more, later seconds)"
    )
    advance = progress(report, "compiling")
    programs = compile_programs(engine.model, engine.spec, engine.state(num_pages), buckets, store)
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


def _use_compile_cache(path: Path | None) -> Path | None:
    """Turns on what makes a restart quick. Returns the folder for executables, None for none.

    A CPU executable that XLA loads from its own cache cannot be serialised again (its functions
    are missing when it is loaded the second time): there, our store works alone, and a cache that
    the user set for JAX turns it off.
    """
    if path is None:
        return None
    is_cpu = jax.default_backend() == "cpu"
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        if is_cpu:
            return None
    elif not is_cpu:
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


class CompileCounter:
    """Counts XLA compilations from its making on, by JAX's own monitoring events."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        self.count += event == _COMPILE_EVENT

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._hear)
