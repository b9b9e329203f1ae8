"""The `chat` and `complete` commands: a talk in the terminal, with a server or an engine here.

Talks to a server with the standard library's HTTP client, so that it starts at once.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jaxserve.address import parse_server
from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError
from jaxserve.options import ChatOptions, CompleteOptions

if TYPE_CHECKING:
    from jaxserve.llm import LLM

Message = dict[str, str]
Answer = Callable[[list[Message]], Iterator[str]]  # the conversation so far -> pieces of text

TIMEOUT_S = 600.0


def chat_with_server(options: ChatOptions) -> int:
    """Holds a conversation with the server at `options.url`; returns the exit status."""
    model = options.model_name or _first_model(options)
    return _converse(options, lambda messages: _ask_server(options, model, messages), model)


def complete_with_server(options: CompleteOptions) -> int:
    """Goes on with each text that is typed, by the server at `options.url`; returns the status."""
    model = options.model_name or _first_model(options)
    if options.quick:
        _print_answer(_continue_text(options, model, options.quick))
        return 0
    print(f"{model} goes on with what is typed. /quit or Ctrl-D leaves, Ctrl-C stops a text.")
    while (text := _read_message()) is not None:
        try:
            _print_answer(_continue_text(options, model, text))
        except KeyboardInterrupt:
            print("\n(stopped)")
        except JaxserveError as error:
            print(f"jaxserve: error: {error}", file=sys.stderr)
    return 0


def chat_here(config: EngineConfig, options: ChatOptions) -> int:
    """Holds a conversation with an engine in this process; returns the exit status."""
    from jaxserve.llm import LLM

    with LLM(**dataclasses.asdict(config)) as llm:
        return _converse(options, lambda messages: _ask_here(llm, options, messages), config.model)


def _converse(options: ChatOptions, answer: Answer, model: str) -> int:
    """Reads messages until the end of input; one that fails or is stopped leaves no trace."""
    opening: list[Message] = []
    if options.system_prompt:
        opening = [{"role": "system", "content": options.system_prompt}]
    if options.quick:
        _print_answer(answer([*opening, {"role": "user", "content": options.quick}]))
        return 0
    print(f"Talking to {model}. /reset forgets the conversation, /quit or Ctrl-D leaves,")
    print("Ctrl-C stops an answer.")
    messages = list(opening)
    while (text := _read_message()) is not None:
        if text == "/reset":
            messages = list(opening)
            continue
        question: Message = {"role": "user", "content": text}
        try:
            reply = _print_answer(answer([*messages, question]))
        except KeyboardInterrupt:
            print("\n(stopped)")
            continue
        except JaxserveError as error:
            print(f"jaxserve: error: {error}", file=sys.stderr)
            continue
        messages += [question, {"role": "assistant", "content": reply}]
    return 0


def _read_message() -> str | None:
    """Returns the next message that is not empty; None at the end of input."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return None
        if text == "/quit":
            return None
        if text:
            return text


def _print_answer(pieces: Iterator[str]) -> str:
    reply = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        reply += piece
    print()
    return reply


def _ask_here(llm: LLM, options: ChatOptions, messages: list[Message]) -> Iterator[str]:
    given: dict[str, Any] = {"max_tokens": options.max_tokens}
    if options.temperature is not None:
        given["temperature"] = options.temperature
    params = dataclasses.replace(llm.get_default_sampling_params(), **given)
    yield llm.chat(messages, params, use_tqdm=False)[0].outputs[0].text


def _ask_server(options: ChatOptions, model: str, messages: list[Message]) -> Iterator[str]:
    body = {"model": model, "messages": messages, "max_completion_tokens": options.max_tokens}
    for choice in _stream(options, "/v1/chat/completions", body):
        yield choice["delta"].get("content") or ""


def _continue_text(options: CompleteOptions, model: str, text: str) -> Iterator[str]:
    body = {"model": model, "prompt": text, "max_tokens": options.max_tokens}
    for choice in _stream(options, "/v1/completions", body):
        yield choice.get("text") or ""


def _stream(
    options: ChatOptions | CompleteOptions, path: str, body: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the choices of a stream's chunks. Raises `JaxserveError` if it breaks."""
    body["stream"] = True
    if options.temperature is not None:
        body["temperature"] = options.temperature
    with _open(options, path, body) as response:
        try:
            for line in response:
                data = line.strip().removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if error := chunk.get("error"):
                    raise JaxserveError(str(error.get("message", error)))
                yield from chunk.get("choices", ())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise JaxserveError(f"{options.url}: the stream broke: {error}") from error


def _first_model(options: ChatOptions | CompleteOptions) -> str:
    with _open(options, "/v1/models") as response:
        try:
            return str(json.loads(response.read())["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise JaxserveError(f"{options.url}/v1/models lists no model") from error


def _open(
    options: ChatOptions | CompleteOptions, path: str, body: dict[str, Any] | None = None
) -> http.client.HTTPResponse:
    """Returns the response to one request; raises `JaxserveError` unless its status is 200."""
    server = parse_server(options.url, options.api_key)
    kind = http.client.HTTPSConnection if server.is_tls else http.client.HTTPConnection
    connection = kind(server.host, server.port, timeout=TIMEOUT_S)
    headers = {"Connection": "close", "Content-Type": "application/json"}
    if server.api_key:
        headers["Authorization"] = f"Bearer {server.api_key}"
    try:
        connection.request(
            "GET" if body is None else "POST",
            server.path + path,
            None if body is None else json.dumps(body),
            headers,
        )
        response = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise JaxserveError(f"no answer from {options.url}: {error}") from error
    if response.status != 200:
        raise JaxserveError(f"{options.url}: {_error_text(response)}")
    return response


def _error_text(response: http.client.HTTPResponse) -> str:
    body = response.read()
    try:
        return f"{response.status}: {json.loads(body)['error']['message']}"
    except (ValueError, LookupError, TypeError):
        return f"{response.status}: {body[:200].decode(errors='replace')}"
