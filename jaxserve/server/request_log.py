"""One log line for each request, at its end: who, what, how long, how many tokens; no text."""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Scope, Send

from jaxserve.config import ServerConfig

if TYPE_CHECKING:
    from jaxserve.server.generate import Generation

_SCOPE_KEY = "jaxserve.record"
_FIT_FOR_A_HEADER = re.compile(rb"[\x21-\x7e]{1,128}")

logger = logging.getLogger("jaxserve.requests")


@dataclass(kw_only=True)
class RequestRecord:
    """What is known of one HTTP request; filled in on its way. One event loop owns it."""

    request_id: str  # as header or body name it, else made up
    start_s: float = field(default_factory=time.monotonic)
    status: int | None = None  # None until the reply begins
    generation: Generation | None = None

    def fields(self, scope: Scope) -> dict[str, Any]:
        """Returns what the log line tells."""
        told: dict[str, Any] = {
            "request_id": self.request_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": self.status,
            "seconds": round(time.monotonic() - self.start_s, 4),
        }
        if self.generation is not None:
            usage = self.generation.usage
            told["prompt_tokens"] = usage.prompt_tokens
            told["completion_tokens"] = usage.completion_tokens
            told["finish_reasons"] = sorted(self.generation.finish_reasons)
        return told


def open_record(scope: Scope) -> RequestRecord:
    """Returns the record of a request that has just come; `record_of` finds it again."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    known = given.decode() if _FIT_FOR_A_HEADER.fullmatch(given) else secrets.token_hex(16)
    record: RequestRecord = RequestRecord(request_id=known)
    scope[_SCOPE_KEY] = record
    return record


def record_of(scope: Scope) -> RequestRecord:
    """Returns the record that `open_record` made."""
    record: RequestRecord = scope[_SCOPE_KEY]
    return record


def recording_send(send: Send, record: RequestRecord, config: ServerConfig) -> Send:
    """Returns a `send` that notes the status, and names the request where the options say so."""

    async def send_recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            if config.enable_request_id_headers:
                name = (b"x-request-id", record.request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), name]}
        await send(message)

    return send_recorded


def log_request(scope: Scope, record: RequestRecord, config: ServerConfig) -> None:
    """Writes the line, if the options ask for it."""
    if config.enable_log_requests:
        logger.info("request", extra={"fields": record.fields(scope)})
