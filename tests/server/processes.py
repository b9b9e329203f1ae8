"""Servers as processes of their own, found by the line that says where they listen."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx2

ROOT = Path(__file__).parents[2]


class ServerProcess:
    """A running `jaxserve serve`, its log, and its address once it listens."""

    def __init__(self, process: subprocess.Popen[str], listening: str, timeout_s: float) -> None:
        self.process = process
        self.log: list[str] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for_line(listening, timeout_s)

    def wait_for_line(self, pattern: str, timeout_s: float) -> str:
        """Returns the first group of the log line that matches."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            left_s = max(0.01, deadline_s - time.monotonic())
            with contextlib.suppress(queue.Empty):
                if match := re.search(pattern, self._lines.get(timeout=left_s)):
                    return match.group(1)
            assert time.monotonic() < deadline_s, "".join(self.log)

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until /ready says 200."""
        deadline_s = time.monotonic() + timeout_s
        with httpx2.Client(base_url=self.url) as http:
            while http.get("/ready").status_code != 200:
                assert self.process.poll() is None, "".join(self.log)
                assert time.monotonic() < deadline_s, "".join(self.log)
                time.sleep(0.02)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            self._lines.put(line)


def free_port() -> int:
    """Returns a port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def children_of(pid: int | str) -> set[int]:
    """Returns the processes that this one has started and that still run."""
    found: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
                found |= set(map(int, (task / "children").read_text().split()))
    return found


@contextlib.contextmanager
def running(
    command: Sequence[str],
    *,
    listening: str = r"listening on (http://\S+)",
    listen_timeout_s: float = 30.0,
    env: Mapping[str, str] | None = None,  # over this process's own
) -> Iterator[ServerProcess]:
    """Starts a server and kills it at the end, should it still run."""
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **(env or {})},
        cwd=ROOT,
    )
    try:
        yield ServerProcess(process, listening, listen_timeout_s)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
