"""The engine: loads a model, then plans, dispatches and commits steps, one ahead of the device."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.grammar import MaskFiller, Matcher, advance
from jaxserve.engine.info import STEP_TOKEN_BOUNDS, EngineStats, Report
from jaxserve.engine.leader import Leader
from jaxserve.engine.pages import PagePool
from jaxserve.engine.prefix_cache import PrefixCache
from jaxserve.engine.request import Request, Update
from jaxserve.engine.runner import Pending
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.sequence import SpanResult, StepPlan
from jaxserve.engine.startup import Started, start

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class EngineCore:
    """Owns the scheduler and the runner of one model. One thread calls it.

    The device never waits for Python: a step is dispatched before the one before it is read,
    unless a grammar must see a token of that one to say what may follow it.
    """

    def __init__(
        self,
        config: EngineConfig,
        report: Report,
        leader: Leader | None = None,  # of the processes that dispatch what this one plans
    ) -> None:
        publish = None if leader is None else leader.send_step
        started = start(config, report, peers=leader, publish=publish)
        settings = started.engine.settings
        self._leader = leader
        self._pools = [PagePool(started.num_pages) for _ in range(settings.limits.num_ranks)]
        self._scheduler = _make_scheduler(config, started, self._pools)
        self._runner = started.runner
        self._masks = MaskFiller(
            mask_words=settings.limits.mask_words, eos_tokens=started.eos_tokens
        )
        self.max_waiting = settings.max_waiting
        self.vocab_size = settings.limits.vocab_size  # of the masks, padded
        self.info = started.info
        self._pending: Pending | None = None
        self._dispatch_s = 0.0  # when the newest step was dispatched
        self._read_s = 0.0  # when the newest read tokens had arrived
        self._host_gap_s = 0.0
        self._step_s = 0.0
        self._step_tokens = [0] * (len(STEP_TOKEN_BOUNDS) + 1)
        self._step_tokens_sum = 0
        self._compiles = CompileCounter()

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

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queues a request, with the matcher of its grammar if it has one.

        Raises QueueFull, or RequestError for one that cannot ever run.
        """
        self._scheduler.add(request, matcher)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forgets requests: their pages are free at once. Unknown ids are ignored."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    def step(self) -> list[Update]:
        """Dispatches the next step, then reads and commits the one before it."""
        if self._leader is None:
            return self._step()
        try:
            with self._leader.step_in_time():
                return self._step()
        except Exception as error:
            # A collective may notice that a process is lost before its connection does.
            raise self._leader.explain(error) from error

    def _step(self) -> list[Update]:
        previous, self._pending = self._pending, None
        plan = self._scheduler.plan_step()
        results: list[SpanResult] | None = None
        if plan is not None:
            packed = self._runner.pack(plan)
            if plan.awaits_tokens and previous is not None:
                results = self._read(previous)
            masks = self._masks.fill(plan, packed)
            self._count_waits(plan, previous)
            self._pending = self._runner.dispatch(plan, packed, masks)
            self._dispatch_s = time.monotonic()
        if previous is None:
            return []
        if results is None:
            results = self._read(previous)
        updates = self._scheduler.commit(previous.plan, results)
        if not self.has_work:
            self._scheduler.check_idle()
        return updates

    def _read(self, pending: Pending) -> list[SpanResult]:
        """Waits for a step; its tokens are known to the matchers, but not committed yet."""
        results = self._runner.read(pending)
        now_s = time.monotonic()
        self._step_s += now_s - max(self._read_s, pending.dispatched_s)
        self._read_s = now_s
        advance(pending.plan, results)
        return results

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
            step_tokens=tuple(self._step_tokens),
            step_tokens_sum=self._step_tokens_sum,
        )

    def close(self, reason: str | None = None) -> None:
        """Lets go of the device's memory, and ends the other processes; a reason is what failed."""
        if self._leader is not None:
            self._leader.end(None if reason is None else f"process 0 failed: {reason}")
        self._compiles.close()
        self._pending = None
        self._runner.close()

    def _count_waits(self, plan: StepPlan, previous: Pending | None) -> None:
        """Notes when new sequences began and how long the device may have stood idle.

        A device that still runs the step before does not wait. One that is done has idled at most
        since the tokens before those were read: an upper bound.
        """
        now_s = time.monotonic()
        num_tokens = sum(span.count for span in plan.spans)
        self._step_tokens[bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1
        self._step_tokens_sum += num_tokens
        for sequence in plan.admitted:
            if not sequence.num_preemptions:
                sequence.started_s = now_s
        if previous is not None and previous.is_done():
            self._host_gap_s += now_s - max(self._read_s, self._dispatch_s)


def _make_scheduler(config: EngineConfig, started: Started, pools: Sequence[PagePool]) -> Scheduler:
    settings = started.engine.settings
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
        eos_tokens=started.eos_tokens,
        max_page_grants=limits.max_grants,
        max_history_tokens=limits.max_history,
        max_wide_admissions=limits.max_wide,
        policy=config.scheduling_policy,
    )


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
