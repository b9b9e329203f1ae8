"""What the endpoints share: the engine, the text side, and whether requests are taken now."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxserve.config import ServerConfig
from jaxserve.engine.info import EngineInfo
from jaxserve.engine.ipc import IpcClient
from jaxserve.errors import NotFound, NotReady
from jaxserve.server.metrics import ServerMetrics
from jaxserve.server.model_text import ModelText


@dataclass(kw_only=True)
class ServerState:
    """Loading, then ready, then draining; dead as soon as the engine is. One event loop owns it."""

    config: ServerConfig
    model_names: tuple[str, ...]  # the first is the one that replies carry
    root: str  # what the model was loaded from
    engine: IpcClient | None = None
    text: ModelText | None = None
    is_draining: bool = False
    failure: str | None = None  # why there is no engine and will be none
    num_running: int = 0  # HTTP requests past the door
    created: int = field(default_factory=lambda: int(time.time()))
    metrics: ServerMetrics = field(default_factory=ServerMetrics)

    def check_alive(self) -> None:
        """Raises `NotReady` when the engine has died: whoever asks should ask another server."""
        if self.engine is not None and self.engine.error is not None:
            raise NotReady(f"the engine has stopped: {self.engine.error}")
        if self.failure is not None:
            raise NotReady(f"the server cannot serve: {self.failure}")

    def check_ready(self) -> None:
        """Raises `NotReady` while loading or draining, and when the engine has died."""
        self.check_alive()
        if self.is_draining:
            raise NotReady("the server is shutting down")
        if self.engine is None or self.engine.info is None or self.text is None:
            raise NotReady("the model is loading")

    def loaded(self) -> tuple[IpcClient, EngineInfo, ModelText]:
        """Returns what a request needs. Raises as `check_ready` does, draining excepted."""
        self.check_alive()
        if self.engine is None or self.engine.info is None or self.text is None:
            raise NotReady("the model is loading")
        return self.engine, self.engine.info, self.text

    def model_name_for(self, asked: str | None) -> str:
        """Returns the name that replies carry. Raises `NotFound` unless the model is served."""
        if not asked:
            return self.model_names[0]
        if asked not in self.model_names:
            known = ", ".join(self.model_names)
            raise NotFound(f"no model is named {asked[:200]!r}; served: {known}", param="model")
        return self.model_names[0]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Counts a request as running, so that draining waits for it."""
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
