"""Renders a template that came with a request in a process of its own, with limits.

Jinja's sandbox keeps a template from the host's objects, but not from its time and memory:
`10 ** (10 ** 8)` takes minutes, inside one C function that nothing in the process interrupts.
Host only: imports no jax.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from jaxserve.text.template_environment import RENDER_ERRORS, template_environment

MAX_TEMPLATE_CHARS = 65536
MAX_TEXT_BYTES = 2**24
CPU_S = 1  # of the process, its start included
WALL_S = 10.0
MEMORY_BYTES = 2**29
_EXCEEDED = f"it exceeded {CPU_S} s of CPU time, {WALL_S:g} s in all or {MEMORY_BYTES >> 20} MiB"


def render_isolated(source: str, values: Mapping[str, Any]) -> str:
    """Returns the text that `source` renders. Raises jinja2's `TemplateError`, limits included."""
    # No environment: what the server knows of keys must not be there to be found.
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jaxserve.text.isolated_template"],
            input=json.dumps({"source": source, "values": values}).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=WALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise TemplateError(_EXCEEDED) from None
    if done.returncode != 0:
        raise TemplateError(_EXCEEDED)
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise TemplateError(answer["error"])
    return str(answer["text"])


def _main() -> None:
    """Renders what standard input asks for; a process that exceeds a limit dies without answer."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    asked = json.load(sys.stdin)
    answer: dict[str, str]
    try:
        template = template_environment().from_string(asked["source"])
        answer = {"text": template.render(asked["values"])}
    except RENDER_ERRORS as error:
        answer = {"error": f"{error}"[:1000] or type(error).__name__}
    if len(answer.get("text", "")) > MAX_TEXT_BYTES:
        answer = {"error": f"its text is longer than {MAX_TEXT_BYTES} characters"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
