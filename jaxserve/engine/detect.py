"""Prints what cluster jax finds itself in: Slurm, Open MPI, Kubernetes jobs, Cloud TPU and GKE.

`python -m jaxserve.engine.detect` is how `cluster` asks: the front itself imports no jax.
"""

from __future__ import annotations

import json

from jax._src.clusters import ClusterEnv  # jax.distributed's own; no public name gives it alone

_TIMEOUT_S = 300


def main() -> None:
    """Prints one line of JSON, its values null where nothing was detected."""
    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, _TIMEOUT_S
    )
    names = ("coordinator", "num_processes", "process_id", "local_device_ids")
    values = dict(zip(names, found, strict=True))
    print(json.dumps({name: value for name, value in values.items() if value is not None}))


if __name__ == "__main__":
    main()
