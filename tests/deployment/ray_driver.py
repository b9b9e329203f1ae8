"""A Ray cluster of its own with the application on it: `ray_driver.py OPTIONS_JSON PORT FOLDER`.

Says "listening on" once every replica serves; ends all of it on SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys

import ray
from ray import serve

from jaxserve.ray_serve import application


def main() -> None:
    options, port, folder = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        _temp_dir=folder,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application(options), route_prefix="/")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print(f"listening on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
