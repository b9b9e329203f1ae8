"""Holds the compiled step of every bucket and the device state, and runs plans on them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxserve.engine.executables import ExecutableStore
from jaxserve.engine.jax_compat import accept_packed_arguments
from jaxserve.engine.packing import (
    Packed,
    blob_layout,
    empty_blob,
    extras_layout,
    num_top_logprobs,
    pack,
)
from jaxserve.engine.peers import Peers
from jaxserve.engine.request import TokenLogprobs
from jaxserve.engine.sequence import SpanResult, StepPlan
from jaxserve.engine.step import RANK, DeviceState, StepSpec, make_step
from jaxserve.errors import ConfigError
from jaxserve.mesh import put
from jaxserve.models.loading import AbstractModel

Bucket = tuple[int, int]  # tokens, rows
# Blob, extras and masks, for other processes.
Publish = Callable[[Bucket, bytes, bytes | None, bytes | None], None]


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A dispatched step whose tokens are not yet read."""

    plan: StepPlan
    packed: Packed
    output: jax.Array  # [ranks * rows, 3 + 2 * max_logprobs] i32, on its way to the host
    dispatched_s: float  # time.monotonic()

    def is_done(self) -> bool:
        """Returns whether the device has finished the step."""
        return self.output.is_ready()  # type: ignore[attr-defined]  # not in jax's stubs


class Runner:
    """Runs steps on the device. One thread (the engine's) calls it.

    Every call goes to a held `Compiled`: an argument of another shape raises, nothing compiles.
    """

    def __init__(
        self,
        *,
        spec: StepSpec,
        params: tuple[jax.Array, ...],
        state: DeviceState,
        publish: Publish | None = None,  # called before each step is dispatched
    ) -> None:
        self._spec = spec
        self._publish = publish
        self._params = params
        self._state = state
        self._programs: dict[Bucket, jax.stages.Compiled] = {}
        self._buckets: tuple[Bucket, ...] = ()
        self._by_rank = NamedSharding(spec.mesh, RANK)
        no_extras = np.zeros((spec.limits.num_ranks, extras_layout(spec.limits).size), np.int32)
        self._no_extras = put(no_extras, self._by_rank)
        self._no_grammar: dict[int, jax.Array] = {}  # by rows
        self.num_dispatches = 0

    @property
    def num_programs(self) -> int:
        """Compiled steps held, one for each bucket."""
        return len(self._programs)

    def close(self) -> None:
        """Drops parameters, state and programs, so that their memory is free."""
        self._params = ()
        self._programs = {}
        del self._state

    def hold(self, bucket: Bucket, program: jax.stages.Compiled) -> None:
        """Takes a bucket's program and runs it once, on nothing.

        The CPU backend builds its matrix kernels on the first run, the better part of a second.
        """
        limits = self._spec.limits
        mask = np.zeros((limits.num_ranks * bucket[1], limits.mask_words), np.uint32)
        self._no_grammar.setdefault(bucket[1], put(mask, self._by_rank))
        self._programs[bucket] = program
        self._buckets = tuple(sorted(self._programs))
        jax.block_until_ready(self.run(bucket, empty_blob(limits, *bucket), None, None))

    def pack(self, plan: StepPlan) -> Packed:
        """Returns the plan's upload."""
        return pack(plan, self._spec.limits, self._buckets)

    def dispatch(
        self,
        plan: StepPlan,
        packed: Packed,  # of the plan
        masks: np.ndarray | None,  # [ranks * rows, ceil(vocab / 32)] i32
    ) -> Pending:
        """Starts the plan's step, and returns without waiting for it."""
        bucket = packed.num_tokens, packed.num_rows
        uploads = packed.blob, packed.extras, masks
        if self._publish is not None:
            blob, *rest = [None if array is None else array.tobytes() for array in uploads]
            assert blob is not None
            self._publish(bucket, blob, *rest)
        output = self.run(bucket, *uploads)
        output.copy_to_host_async()
        self.num_dispatches += 1
        return Pending(plan=plan, packed=packed, output=output, dispatched_s=time.monotonic())

    def run_published(
        self, bucket: Bucket, blob: bytes, extras: bytes | None, masks: bytes | None
    ) -> jax.Array:
        """Starts a step that another process's runner published."""
        num_ranks = self._spec.limits.num_ranks
        uploads = [
            None if data is None else np.frombuffer(data, np.int32).reshape(num_rows, -1)
            for data, num_rows in (
                (blob, num_ranks),
                (extras, num_ranks),
                (masks, num_ranks * bucket[1]),
            )
        ]
        assert uploads[0] is not None
        return self.run(bucket, uploads[0], *uploads[1:])

    def run(
        self,
        bucket: Bucket,
        blob: np.ndarray,  # [ranks, blob_layout.size] i32
        extras: np.ndarray | None,  # [ranks, extras_layout.size] i32
        masks: np.ndarray | None,  # [ranks * rows, ceil(vocab / 32)] i32
    ) -> jax.Array:  # [ranks * rows, 3 + 2 * max_logprobs] i32
        """Calls a bucket's program; the only place that does."""
        self._state, output = self._programs[bucket](
            self._params,
            self._state,
            put(blob, self._by_rank),
            self._no_extras if extras is None else put(extras, self._by_rank),
            self._no_grammar[bucket[1]]
            if masks is None
            else put(masks.view(np.uint32), self._by_rank),
        )
        return output

    def read(self, pending: Pending) -> list[SpanResult]:
        """Waits for a step and returns what it brought for each span of its plan."""
        report = np.asarray(pending.output)
        tokens = report[:, 0].tolist()
        results = []
        for span, (rank, first) in zip(pending.packed.spans, pending.packed.places, strict=True):
            row = rank * pending.packed.num_rows + first
            params = span.sequence.request.params
            last = row + span.num_rows - 1
            scored = range(row, row + span.num_rows - span.samples)
            has_logprobs = span.samples and params.logprobs is not None
            results.append(
                SpanResult(
                    token=tokens[last] if span.samples else None,
                    logprobs=token_logprobs(report[last], num_top_logprobs(params))
                    if has_logprobs
                    else None,
                    prompt_logprobs=tuple(
                        token_logprobs(report[index], params.prompt_logprobs or 0)
                        for index in scored
                    ),
                )
            )
        return results


def token_logprobs(
    row: np.ndarray,  # [3 + 2 * max_logprobs] i32, as `ops.sampling.sample` reports it
    count: int,
) -> TokenLogprobs:
    """Returns the chosen token's log-probability and the `count` most likely (or listed) ones'."""
    max_logprobs = (len(row) - 3) // 2
    values = row.view(np.float32)
    tops = row[3 : 3 + count].tolist()
    return TokenLogprobs(
        token=int(row[0]),
        logprob=float(values[1]),
        rank=int(row[2]),
        top=tuple(
            zip(tops, values[3 + max_logprobs : 3 + max_logprobs + count].tolist(), strict=True)
        ),
    )


def buckets_for(max_tokens: int, max_rows: int, min_rows: int) -> tuple[Bucket, ...]:
    """Returns the (tokens, rows) buckets of a configuration, at most 16.

    One-token steps get a row bucket each; steps with prefills get a token bucket, all rows.
    """
    rows = _powers(min_rows, max(max_rows, min_rows))
    if len(rows) > 2 and rows[1] < 8:
        del rows[1]  # next to nothing faster than 8 rows
    smallest = max(64, 2 * rows[-1])
    tokens = _powers(smallest, max(max_tokens, smallest))
    buckets = [(count, count) for count in rows] + [(count, rows[-1]) for count in tokens]
    if len(buckets) > 16:
        raise ConfigError(
            f"max_num_batched_tokens {max_tokens} and max_num_seqs {max_rows} need {len(buckets)} "
            "programs; the limit is 16"
        )
    return tuple(buckets)


def _powers(first: int, last: int) -> list[int]:
    """Returns first, 2 first, 4 first, ... below `last`, and `last`."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return [*values, last]


def compile_programs(
    model: AbstractModel,
    spec: StepSpec,
    state: Any,  # DeviceState of ShapeDtypeStructs
    buckets: tuple[Bucket, ...],
    *,
    store: ExecutableStore | None,
    peers: Peers | None = None,
) -> Iterator[tuple[Bucket, jax.stages.Compiled]]:
    """Yields the compiled step of every bucket as it is done, from the store where it has it.

    Loading, lowering and compiling run on threads. Several processes take the same programs from
    their stores, since compilers may measure together, and yield in the same order when all are
    done: a program runs on all or on none.
    """

    def load(bucket: Bucket) -> jax.stages.Compiled | None:
        compiled = None if store is None else store.load(bucket)
        return None if compiled is None else accept_packed_arguments(compiled)

    def build(bucket: Bucket) -> jax.stages.Compiled:
        compiled = accept_packed_arguments(lower_step(model, spec, state, bucket).compile())
        if store is not None:
            # Without a place on disk the engine still runs; the next start compiles again.
            with contextlib.suppress(OSError, ValueError):
                store.save(compiled, bucket)
        return compiled

    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="compile") as pool:
        loaded = zip(buckets, pool.map(load, buckets), strict=True)
        found = {bucket: program for bucket, program in loaded if program is not None}
        if peers is not None:
            everywhere = set[Bucket].intersection(
                *({(one[0], one[1]) for one in theirs} for theirs in peers.exchange(list(found)))
            )
            found = {bucket: found[bucket] for bucket in found if bucket in everywhere}
        else:
            yield from found.items()
        futures = {pool.submit(build, bucket): bucket for bucket in buckets if bucket not in found}
        try:
            for future in as_completed(futures):
                if peers is None:
                    yield futures[future], future.result()
                else:
                    found[futures[future]] = future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if peers is not None:
        peers.exchange("compiled")
        for bucket in sorted(found):
            yield bucket, found[bucket]


def lower_step(
    model: AbstractModel, spec: StepSpec, state: Any, bucket: Bucket
) -> jax.stages.Lowered:
    """Returns the lowered step of one bucket; the arguments are those `Runner.dispatch` passes."""
    num_tokens, num_rows = bucket
    limits, num_ranks = spec.limits, spec.limits.num_ranks
    by_rank = NamedSharding(spec.mesh, RANK)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_rank)

    return make_step(spec, model, bucket).lower(
        model.shapes,
        state,
        array((num_ranks, blob_layout(limits, num_tokens, num_rows).size), jnp.int32),
        array((num_ranks, extras_layout(limits).size), jnp.int32),
        array((num_ranks * num_rows, limits.mask_words), jnp.uint32),
    )
