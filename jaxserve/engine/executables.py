"""Compiled programs on disk, so that a restart neither traces nor compiles.

An entry is found by a key of everything that shaped it; what does not load is compiled again. The
files hold pickles: the directory is the user's own, mode 0700, and nothing else is ever read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax.experimental import serialize_executable

import jaxserve
import pallas_kernels
from jaxserve.errors import ConfigError

_KEPT_S = 30 * 24 * 3600


class ExecutableStore:
    """A directory of executables for one engine's settings. Any thread may use it."""

    def __init__(self, directory: Path, devices: Sequence[jax.Device], *settings: object) -> None:
        self._directory = private_directory(directory)
        self._devices = list(devices)  # that the programs run on, of all there are
        self._settings = "\n".join([*_platform_facts(), *(repr(setting) for setting in settings)])

    def load(self, *program: object) -> jax.stages.Compiled | None:
        """Returns the program as compiled before, or None."""
        path = self._path(program)
        try:
            executable, in_tree, out_tree = pickle.loads(path.read_bytes())
            path.touch()
            return serialize_executable.deserialize_and_load(
                executable, in_tree, out_tree, execution_devices=self._devices
            )
        except FileNotFoundError:
            return None
        except Exception:  # a file of another jaxlib, or cut short: compile again
            path.unlink(missing_ok=True)
            return None

    def save(self, compiled: jax.stages.Compiled, *program: object) -> None:
        """Writes a compiled program, whole or not at all.

        Raises OSError for a full or read-only disk, ValueError for a backend that cannot.
        """
        # Others that share the directory may write the same, from hosts that count their processes
        # alike.
        with tempfile.NamedTemporaryFile(
            dir=self._directory, suffix=".tmp", delete=False
        ) as temporary:
            written = Path(temporary.name)
            try:
                temporary.write(pickle.dumps(serialize_executable.serialize(compiled)))
                temporary.close()
                written.replace(self._path(program))
            finally:
                written.unlink(missing_ok=True)

    def prune(self) -> None:
        """Deletes what was not used for a month: other settings, and sources since changed."""
        oldest_s = time.time() - _KEPT_S
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if path.stat().st_mtime < oldest_s:
                    path.unlink()

    def _path(self, program: tuple[object, ...]) -> Path:
        key = hashlib.sha256(f"{self._settings}\n{program!r}".encode()).hexdigest()
        return self._directory / f"{key[:32]}.bin"


def private_directory(path: Path) -> Path:
    """Returns the directory, made if need be, readable by its owner only: this user.

    Raises ConfigError for one that belongs to another or cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise ConfigError(f"compile_cache_dir {path} belongs to another user")
        path.chmod(0o700)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"compile_cache_dir {path} cannot be used ({reason}); an empty one turns it off"
        ) from error
    return path


def _platform_facts() -> list[str]:
    """Returns what an executable depends on besides its program: versions, device, our source."""
    device = jax.devices()[0]
    facts: list[Any] = [
        jax.__version__,
        jaxlib.version.__version__,
        sys.version_info[:2],
        device.platform,
        device.device_kind,
        jax.device_count(),
        jax.process_index(),
        os.environ.get("XLA_FLAGS", ""),
        jax.config.jax_numpy_dtype_promotion,  # type: ignore[attr-defined]
        jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        _cpu_features(),
        source_digest(),
    ]
    return [repr(fact) for fact in facts]


def _cpu_features() -> str:
    """Returns the processor's instruction sets: CPU executables need the same again."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def source_digest() -> str:
    """Returns a hash of all of our source."""
    digest = hashlib.sha256()
    for package in (jaxserve, pallas_kernels):
        for root in package.__path__:
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
