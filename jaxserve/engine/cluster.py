"""Which processes run one model together, and which of them this one is.

Host only: imports no jax, except in the process that asks jax what cluster it is in.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError

_DETECT_TIMEOUT_S = 330.0  # jax waits for the coordinator's name for as long as 300 s

_OPTIONS = ("coordinator", "num_processes", "process_id")
_OPTIONS_OF_SEVERAL = (*_OPTIONS, "health_port", "join_timeout", "step_timeout")
_MAX_SHOWN = 1000  # characters of what a detection that finds nothing has to say

logger = logging.getLogger("jaxserve")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process's place among those that run a model together."""

    host: str  # of process 0
    port: int  # where process 0 takes the others' connections
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] = ()  # of the devices this process takes; empty: all
    join_timeout_s: float = 300.0
    step_timeout_s: float = 60.0

    def to_text(self) -> str:
        """Returns the place as an argument of a command."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_text(cls, text: str) -> Place:
        """Returns the place that `to_text` wrote."""
        return msgspec.json.decode(text, type=cls)


def place_of(
    config: ServerConfig,
    environ: Mapping[str, str],
) -> Place | None:
    """Returns this process's place by its options, else by the cluster it was started in.

    None for one process alone. Raises `ConfigError` for options that name no place, and where
    there is a cluster whose place for this process cannot be detected.
    """
    values = {name: getattr(config, name) for name in _OPTIONS}
    known = {name: value for name, value in values.items() if value != "auto"}
    hint = hint_of(environ) if len(known) < len(_OPTIONS) else None
    if config.num_processes == 1 or (not known and hint is None):
        check_alone(config)
        return None
    detected = {} if hint is None else _detect(environ, hint, is_needed=bool(known))
    if not known and detected.get("num_processes", 1) == 1:
        check_alone(config)
        return None
    values = {**detected, **known}
    if missing := [name for name in _OPTIONS if values.get(name) is None]:
        raise ConfigError(
            f"{' and '.join(known)} alone do not say which process this is: give "
            f"{' and '.join(missing)}, too (no cluster was detected)"
        )
    return _checked(config, values)


def check_alone(config: ServerConfig) -> None:
    """Raises `ConfigError` for options that mean nothing to one process alone."""
    defaults = ServerConfig()
    no_others = {"num_processes": 1, "process_id": 0} if config.num_processes == 1 else {}
    for name in _OPTIONS_OF_SEVERAL:
        value, default = getattr(config, name), getattr(defaults, name)
        if value not in (default, no_others.get(name, default)):
            raise ConfigError(
                f"{name} is {value!r}, but this is one process alone: only several that "
                "`jaxserve serve` runs together have a use for it"
            )


def hint_of(environ: Mapping[str, str]) -> str | None:
    """Returns what in the environment looks like a cluster that jax detects, None if nothing does.

    Asking jax takes a second or more, which one process alone need not wait.
    """
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if environ.get(name, "1") != "1":
            return name
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "JOB_COMPLETION_INDEX"
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in environ.get(name, ""):
            return name
    if environ.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return "MEGASCALE_NUM_SLICES"
    has_tpu = bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
    if has_tpu and "TPU_SKIP_MDS_QUERY" not in environ and "TPU_WORKER_HOSTNAMES" not in environ:
        # A Cloud TPU's other hosts are named by its metadata server alone.
        return "libtpu" if importlib.util.find_spec("libtpu") else None
    return None


def _detect(environ: Mapping[str, str], hint: str, *, is_needed: bool) -> dict[str, object]:
    """Returns what jax's own detection finds, asked in a process of its own.

    Raises `ConfigError` where it fails, unless the hint is a TPU alone, which may well be one host.
    """
    why = f"{hint}={environ[hint]}" if hint in environ else hint
    command = [sys.executable, "-m", "jaxserve.engine.detect"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DETECT_TIMEOUT_S)
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            found: dict[str, object] = json.loads(lines[-1])
            if not found:
                said = " ".join(done.stderr.split())[:_MAX_SHOWN] or "jax does not say why"
                logger.warning("%s, but jax detects no cluster (%s)", why, said)
            elif _has_its_host_alone(environ):
                found.pop("local_device_ids", None)
            return found
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_DETECT_TIMEOUT_S:.0f} s"
    if is_needed or hint != "libtpu":
        raise ConfigError(
            f"{why}, but the cluster cannot be detected: {reason}; give coordinator, "
            "num_processes and process_id, or num_processes 1 to run alone"
        )
    logger.warning("no cluster detected (%s): this process runs alone", reason)
    return {}


def _has_its_host_alone(environ: Mapping[str, str]) -> bool:
    """Returns whether Slurm or Open MPI started one process for each host.

    jax gives every process that they start one device, by its number on the host, where a process
    alone is to have all.
    """
    if (num_hosts := environ.get("SLURM_STEP_NUM_NODES")) is not None:
        return num_hosts == environ.get("SLURM_NTASKS")
    return environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def _checked(config: ServerConfig, values: Mapping[str, object]) -> Place:
    coordinator, count, index = (values[name] for name in _OPTIONS)
    host, colon, port = str(coordinator).rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"coordinator is {coordinator!r}; it must be HOST:PORT")
    assert isinstance(count, int) and isinstance(index, int), values
    if not 0 <= index < count:
        raise ConfigError(f"process_id is {index}; with num_processes {count} it must be below it")
    devices = values.get("local_device_ids") or ()
    assert isinstance(devices, list | tuple), devices
    return Place(
        host=host.strip("[]"),
        port=int(port),
        num_processes=count,
        process_id=index,
        local_device_ids=tuple(devices),
        join_timeout_s=config.join_timeout,
        step_timeout_s=config.step_timeout,
    )
