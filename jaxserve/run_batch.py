"""The `run-batch` command: a file of requests in, a file of replies out, in OpenAI's batch format.

The requests go through the server's own application, without a socket: what it takes and refuses
online it takes and refuses here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import msgspec
from starlette.applications import Starlette
from starlette.types import Message

from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.ipc import ENGINE_COMMAND
from jaxserve.errors import ConfigError
from jaxserve.options import BatchOptions
from jaxserve.server.life import build_app
from jaxserve.server.log import configure_log

logger = logging.getLogger("jaxserve")

ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
RETRY_S = 0.05


class Line(msgspec.Struct, kw_only=True):
    """One line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: Literal["POST"] = "POST"


def run_batch(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    options: BatchOptions,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> int:
    """Answers every line of the input and returns 0, also where some lines were refused.

    Replies are written as they come. Raises `ConfigError` for an input that cannot be read, before
    the model is loaded, and `NotReady` if the model cannot be.
    """
    lines = list(read_lines(Path(options.input_file)))
    configure_log(server_config)
    app = build_app(
        engine_config, dataclasses.replace(server_config, api_key=()), engine_command=engine_command
    )
    try:
        with open(options.output_file, "w") as output:
            num_failed = asyncio.run(_answer_all(app, lines, output))
    except OSError as error:
        raise ConfigError(f"{options.output_file} cannot be written: {error.strerror}") from error
    print(f"jaxserve: {len(lines)} requests, {num_failed} of them refused", file=sys.stderr)
    return 0


def read_lines(path: Path) -> Iterator[Line]:
    """Yields the requests of a batch file. Raises `ConfigError` naming the line at fault."""
    decoder = msgspec.json.Decoder(Line)
    known: set[str] = set()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    for number, text in enumerate(content.splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if line.custom_id in known:
            raise ConfigError(f"{path}, line {number}: custom_id {line.custom_id!r} is used twice")
        known.add(line.custom_id)
        yield line


async def _answer_all(app: Starlette, lines: Sequence[Line], output: TextIO) -> int:
    """Writes a reply to each line; returns how many are errors."""
    num_failed = 0
    async with app.router.lifespan_context(app):
        await app.state.life.wait_ready()
        _, info, _ = app.state.server.loaded()
        # Enough that the engine never waits for the next, few enough for its queue.
        room = asyncio.Semaphore(2 * info.max_num_seqs)

        async def answer(line: Line) -> dict[str, Any]:
            async with room:
                return await _answer(app, line)

        for reply in asyncio.as_completed([answer(line) for line in lines]):
            told = await reply
            num_failed += told["error"] is not None
            output.write(json.dumps(told) + "\n")
            output.flush()
            app.state.server.check_alive()
    return num_failed


async def _answer(app: Starlette, line: Line) -> dict[str, Any]:
    request_id = f"batch-{secrets.token_hex(16)}"
    if refusal := _refusal(line):
        status, body = 400, {"error": refusal}
    else:
        while True:
            status, body = await _post(app, line, request_id)
            if status != 429:
                break
            await asyncio.sleep(RETRY_S)  # one request may be many sequences
    is_error = status != 200
    return {
        "id": f"jaxserve-{secrets.token_hex(16)}",
        "custom_id": line.custom_id,
        "response": {
            "status_code": status,
            "request_id": request_id,
            "body": None if is_error else body,
        },
        "error": body["error"] if is_error else None,
    }


def _refusal(line: Line) -> dict[str, Any] | None:
    """Returns the error of a line that no endpoint is to see."""
    message, param = None, None
    if line.url not in ENDPOINTS:
        message, param = f"url is {line.url[:200]!r}; served: {', '.join(ENDPOINTS)}", "url"
    elif line.body.get("stream"):
        message, param = "a batch does not stream", "body.stream"
    if message is None:
        return None
    return {"message": message, "type": "invalid_request_error", "param": param, "code": 400}


async def _post(app: Starlette, line: Line, request_id: str) -> tuple[int, dict[str, Any]]:
    """Returns the status and the body of the application's reply."""
    status = 0
    received: list[bytes] = []
    asked: list[Message] = [{"type": "http.request", "body": json.dumps(line.body).encode()}]

    async def receive() -> Message:
        if asked:
            return asked.pop()
        return await asyncio.get_running_loop().create_future()  # nobody leaves

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        received.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": line.url,
        "raw_path": line.url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id.encode()),
        ],
    }
    try:
        await app(scope, receive, send)
    except Exception:
        if status != 500:
            raise
        # Starlette raises again what it has answered; the other lines are to be answered, too.
        logger.exception("line %s failed", line.custom_id)
    return status, json.loads(b"".join(received))
