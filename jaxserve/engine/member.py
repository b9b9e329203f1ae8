"""A process of a cluster from its start to its end: joins, starts jax, then leads or follows.

Importing this file imports no jax; joining does.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.engine.client import Deliver, EngineThread
from jaxserve.engine.cluster import Place
from jaxserve.engine.follower import Follower
from jaxserve.engine.info import EngineStats, Report
from jaxserve.engine.leader import Leader
from jaxserve.engine.peers import OnEnd, Peers, is_loopback
from jaxserve.engine.request import Request
from jaxserve.errors import ConfigError, EngineStopped, JaxserveError
from jaxserve.structured_outputs import Grammar, Vocabulary

_STEPS_AHEAD = 2  # that a follower dispatches before the first of them is done
# What may differ from process to process: where things lie on a host.
_OWN_OPTIONS = {"compile_cache_dir", "tokenizer"}


class Member:
    """Owns this process's end of the cluster. The thread that loads calls `start`, any `end`."""

    def __init__(
        self,
        place: Place,
        config: EngineConfig,
        report: Report,
        on_end: OnEnd,
        *,
        on_heard: Callable[[], None],  # process 0 has been heard, by one that follows it
    ) -> None:
        self._config = config
        self._report = report
        self._on_end = on_end
        facts = _facts(config)
        self._peers: Leader | Follower
        if place.process_id:
            self._peers = Follower(place, facts, report, on_end, on_heard=on_heard)
        else:
            self._peers = Leader(place, facts, report, on_end)

    def start(self, deliver: Deliver) -> EngineThread | FollowerEngine:
        """Joins the others and loads. What it raises the others are told first."""
        try:
            self._peers.join()
            start_jax(self._peers)
            if isinstance(self._peers, Follower):
                return FollowerEngine(self._config, self._peers, self._report, self._on_end)
            return EngineThread(self._config, deliver, report=self._report, leader=self._peers)
        except Exception as error:
            name = "" if isinstance(error, JaxserveError) else f"{type(error).__name__}: "
            self.end(f"{name}{error}")
            raise

    def end(self, reason: str | None = None) -> None:
        """Ends the others if this is process 0, else tells it that this process goes, and why."""
        if reason is not None and isinstance(self._peers, Leader):
            reason = f"process 0 failed: {reason}"
        self._peers.end(reason)


class FollowerEngine:
    """Runs the steps that process 0 plans, on a thread of its own. Takes no requests."""

    def __init__(
        self, config: EngineConfig, follower: Follower, report: Report, on_end: OnEnd
    ) -> None:
        from jaxserve.engine.startup import start

        started = start(config, report, peers=follower)
        self.info = started.info
        self.error: BaseException | None = None
        self._follower = follower
        self._runner = started.runner
        self._on_end = on_end
        self._num_steps = 0
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, request: Request) -> None:
        """Raises `EngineStopped`: process 0 takes the requests."""
        raise EngineStopped("this process follows process 0, which takes the requests")

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Ignores it: process 0 makes the masks."""

    def prepare(self, grammar: Grammar) -> None:
        """Raises `EngineStopped`, as `submit` does."""
        raise EngineStopped("this process follows process 0, which takes the requests")

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ignores requests, of which there are none."""

    def stats(self) -> EngineStats:
        """Returns how many steps were run; the rest is process 0's to count."""
        return EngineStats(num_steps=self._num_steps)

    def close(self) -> None:
        """Tells process 0 that this process ends, and so the cluster."""
        self._follower.end()

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            if not isinstance(error, EngineStopped):
                error = self._follower.explain(error)
            # Whoever ended the cluster has been told already; this is for what failed here.
            self._on_end(str(error) or type(error).__name__)

    def _loop(self) -> None:
        import jax

        outputs: collections.deque[jax.Array] = collections.deque()
        while True:
            step = self._follower.next_step()
            outputs.append(self._runner.run_published(*msgspec.structs.astuple(step)))
            self._num_steps += 1
            if len(outputs) > _STEPS_AHEAD:
                jax.block_until_ready(outputs.popleft())


def start_jax(peers: Peers) -> None:
    """Makes this process's devices part of the cluster's. Raises `ConfigError`."""
    import jax

    place = peers.place
    port = peers.jax_address.rpartition(":")[2]
    # jax would take SIGTERM from the process, whose front alone decides what it means.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            peers.jax_address,
            place.num_processes,
            place.process_id,
            local_device_ids=place.local_device_ids or None,
            cluster_detection_method="deactivate",
            coordinator_bind_address=peers.jax_address
            if is_loopback(place.host)
            else f"[::]:{port}",
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"jax cannot join {peers.jax_address}: {error}") from error


def _facts(config: EngineConfig) -> dict[str, str]:
    """Returns what must be the same in every process, by the name that an error gives it."""
    import jax
    import jaxlib.version

    from jaxserve.engine.executables import source_digest

    options = dataclasses.asdict(config)
    return {
        **{name: repr(value) for name, value in options.items() if name not in _OWN_OPTIONS},
        "jax version": jax.__version__,
        "jaxlib version": jaxlib.version.__version__,
        "jaxserve source": source_digest()[:16],
    }
