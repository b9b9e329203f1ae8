"""Replicas under Ray Serve: `serve run jaxserve.ray_serve:application replicas=2 serve="MODEL"`.

Each replica is one actor that hosts the application, engine process included; Ray Serve's proxy
spreads the requests. Needs the extra `ray`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette

from jaxserve.asgi import hosted_configs
from jaxserve.config import EngineConfig, ServerConfig, from_table, option, options_of, parse_text
from jaxserve.engine.ipc import EXIT_GRACE_S
from jaxserve.errors import ConfigError
from jaxserve.server import build_app
from jaxserve.server.life import DEAD_GRACE_S, Life

if TYPE_CHECKING:
    from ray.serve import Application

HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """What the application takes in `args:` of a Serve config, or as `key=value` of `serve run`."""

    serve: str = option("", "arguments of `jaxserve serve`, as in a shell")
    replicas: int = option(1, "replicas, or the fewest of them", low=1)
    max_replicas: int | None = option(None, "most replicas; more than `replicas` autoscales", low=1)
    target_ongoing_requests: float = option(
        32.0, "requests in flight in a replica that autoscaling aims for", low=0.1
    )
    max_ongoing_requests: int = option(
        256, "requests in flight in a replica at most; the proxy holds back the rest", low=1
    )
    cpus: float = option(1.0, "CPUs of a replica", low=0.0)
    gpus: int = option(0, "GPUs of a replica", low=0)
    tpus: int = option(0, "TPU chips of a replica", low=0)
    accelerator_type: str = option("", "Ray's name of the accelerator, e.g. `H100`, `TPU-V5E`")


def application(args: dict[str, Any]) -> Application:
    """Returns the application of `ReplicaOptions`; raises `ConfigError` for what they refuse."""
    from ray import serve  # here, so that the options can be read where Ray is not installed

    options = replica_options(args)
    engine_config, server_config = hosted_configs(shlex.split(options.serve))

    def build() -> Starlette:
        return _build_app(engine_config, server_config)

    deploy = serve.deployment(
        name="jaxserve",
        max_ongoing_requests=options.max_ongoing_requests,
        ray_actor_options=actor_options(options),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        # Ray waits for running requests, then the lifespan drains and ends the engine process.
        graceful_shutdown_timeout_s=server_config.shutdown_timeout + 2 * EXIT_GRACE_S,
        **scaling(options),
    )
    bound: Application = deploy(serve.ingress(build)(Replica)).bind()
    return bound


def replica_options(args: dict[str, Any]) -> ReplicaOptions:
    """Returns the options; `serve run key=value` brings texts, a Serve config typed values."""
    kinds = {item.name: item for item in options_of(ReplicaOptions)}
    typed = {
        key: parse_text(kinds[key], value) if key in kinds and isinstance(value, str) else value
        for key, value in args.items()
    }
    options = from_table(ReplicaOptions, typed)
    if options.max_replicas is not None and options.max_replicas < options.replicas:
        raise ConfigError(
            f"max_replicas is {options.max_replicas}; it must be at least replicas, "
            f"{options.replicas}"
        )
    return options


def actor_options(options: ReplicaOptions) -> dict[str, Any]:
    """Returns what Ray must reserve for a replica."""
    reserved: dict[str, Any] = {"num_cpus": options.cpus, "num_gpus": options.gpus}
    if options.tpus:
        reserved["resources"] = {"TPU": options.tpus}
    if options.accelerator_type:
        reserved["accelerator_type"] = options.accelerator_type
    return reserved


def scaling(options: ReplicaOptions) -> dict[str, Any]:
    """Returns a fixed number of replicas, or the bounds and the aim of autoscaling."""
    if options.max_replicas is None or options.max_replicas == options.replicas:
        return {"num_replicas": options.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": options.replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_ongoing_requests,
        }
    }


class Replica:
    """One actor; `serve.ingress` adds `app` and runs its lifespan. Belongs to its event loop."""

    app: Starlette

    def __init__(self) -> None:
        self._watch: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Returns while requests are taken, else raises why.

        The first call, before Ray sends any request, waits until the model is loaded.
        """
        life: Life = self.app.state.life
        await life.wait_ready()
        if self._watch is None:
            self._watch = asyncio.create_task(_exit_with(life))


async def _exit_with(life: Life) -> None:
    """Ends the process when its engine dies.

    Ray takes three failed checks to replace a replica, and until then one that refuses every
    request at once looks idle, so most of them would go there.
    """
    await life.is_over.wait()
    if not life.state.is_draining:
        await asyncio.sleep(DEAD_GRACE_S)
        os._exit(1)


def _build_app(engine_config: EngineConfig, server_config: ServerConfig) -> Starlette:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("jaxserve").setLevel(logging.INFO)
    return build_app(engine_config, server_config)
