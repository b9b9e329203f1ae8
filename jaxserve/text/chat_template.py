"""Renders a conversation into the one string that a model was trained on.

Host only: imports no jax.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from jinja2 import nodes

from jaxserve.errors import ConfigError, RequestError
from jaxserve.text.content_format import loops_over_content
from jaxserve.text.isolated_template import render_isolated
from jaxserve.text.template_environment import RENDER_ERRORS, template_environment
from jaxserve.text.tokenizer import SENTINEL, Tokenizer

ContentFormat = Literal["string", "openai"]

# Arguments of ours and of `transformers`: as template variables they would change more than text.
RESERVED = frozenset(
    "messages conversation tools documents chat_template add_generation_prompt tokenize "
    "continue_final_message padding truncation max_length tokenizer_kwargs template".split()
)
MAX_ARGUMENTS_DEPTH = 64
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A rendered conversation."""

    text: str
    tokens: list[int]


class ChatTemplate:
    """A compiled template. Immutable; any thread may render.

    `content_format` says if the template loops over the parts of a message's content ("openai")
    or writes it as one string ("string").
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        is_isolated: bool = False,  # nobody vouches for it: rendered in a process with limits
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        environment = template_environment()
        try:
            tree = environment.parse(source)
            # Compiling computes constant expressions already, of any size.
            self._template = None if is_isolated else environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError(f"the chat template does not parse: {error}") from error
        self.content_format: ContentFormat = "openai" if loops_over_content(tree) else "string"
        self._takes_strings = self.content_format == "string" or any(
            test.name == "string" for test in tree.find_all(nodes.Test)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Returns the text that `transformers` renders from the same arguments.

        Raises `RequestError` if the template refuses the messages or fails on them.
        """
        if not messages:
            raise RequestError("messages is empty; it takes at least one", param="messages")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message needs add_generation_prompt to be false",
                param="continue_final_message",
            )
        if taken := sorted(RESERVED & variables.keys()):
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(taken)}", param="chat_template_kwargs"
            )
        chat = [_aliased(_present(message)) for message in _plain(messages, "messages")]
        final = _tag_final(chat, self.source) if continue_final_message else None
        values = {
            **self._special_tokens,
            **_plain(variables, "chat_template_kwargs"),
            "messages": chat,
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            if self._template is None:
                text = render_isolated(self.source, values)
            else:
                text = self._template.render(values)
        except RENDER_ERRORS as error:
            raise RequestError(f"the chat template failed: {error}", param="messages") from error
        return text if final is None else _cut_at_tag(text, final)

    def prepare(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Returns an OpenAI conversation in the form this template reads.

        Parts become one string or the other way round, arguments of tool calls become objects,
        and `developer` becomes `system` where the template does not know it. Raises
        `RequestError` for a malformed message and for parts that are not text.
        """
        return [self._prepare_one(index, message) for index, message in enumerate(messages)]

    def _prepare_one(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        plain = _plain(message, f"messages[{index}]")
        if not isinstance(plain, dict) or not isinstance(plain.get("role"), str):
            raise RequestError(f"messages[{index}] must be an object with a role", param="messages")
        if plain["role"] == "developer" and "developer" not in self.source:
            plain["role"] = "system"
        texts = list(texts_of(plain.get("content"), index))
        if self.content_format == "string":
            plain["content"] = "\n".join(texts)
        elif not isinstance(plain.get("content"), str) or not self._takes_strings:
            plain["content"] = [{"type": "text", "text": text} for text in texts]
        calls = plain.get("tool_calls") or ()
        if not isinstance(calls, list | tuple):
            raise RequestError(f"messages[{index}].tool_calls must be a list", param="messages")
        for call in calls:
            _parse_arguments(call, index)
        return plain


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
    add_special_tokens: bool = False,
    check: Callable[[str], None] | None = None,  # sees the text before it is encoded
) -> ChatPrompt:
    """Returns an OpenAI conversation as the model's prompt.

    Special tokens typed inside a message, a tool or a variable stay plain text. Templates write
    BOS themselves; `add_special_tokens` is for those that do not.
    """
    inputs = {
        "messages": template.prepare(messages),
        "tools": _plain(tools, "tools"),
        "documents": _plain(documents, "documents"),
        "variables": _variables(variables or {}),
    }
    guarded = tokenizer.guard(inputs)
    text = template.render(
        guarded["messages"],
        tools=guarded["tools"],
        documents=guarded["documents"],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **guarded["variables"],
    )
    if check is not None:
        check(text)
    if guarded is inputs:
        tokens = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ChatPrompt(text=text, tokens=tokens)
    tokens = tokenizer.encode_rendered(text, add_special_tokens=add_special_tokens)
    return ChatPrompt(text=text.replace(SENTINEL, ""), tokens=tokens)


def _variables(variables: Mapping[str, Any]) -> Any:
    """Returns the client's own variables. Raises `RequestError` for one with a name of ours."""
    if taken := sorted((RESERVED | {"self"}) & variables.keys()):
        raise RequestError(
            f"chat_template_kwargs may not set {', '.join(taken)}", param="chat_template_kwargs"
        )
    return _plain(variables, "chat_template_kwargs")


def _plain(value: Any, where: str) -> Any:
    """Returns a copy made of JSON types only: a template must not reach a caller's objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):  # the openai client's objects
        return _plain(dump(exclude_none=True), where)
    raise RequestError(
        f"{where} holds a {type(value).__name__}; it takes JSON values", param=where.split("[")[0]
    )


def _present(message: Any) -> dict[str, Any]:
    """Returns a message without its nulls, on which many templates fail."""
    if not isinstance(message, dict):
        raise RequestError(f"a message is {message!r}; it must be an object", param="messages")
    return {key: value for key, value in message.items() if value is not None}


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message with its reasoning under the names that templates read."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def texts_of(content: Any, index: int) -> Iterator[str]:
    """Yields the text parts of a message's content; `RequestError` for any other part."""
    if content is None:
        return
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list):
        raise RequestError(
            f"messages[{index}].content must be a string or a list of parts", param="messages"
        )
    for part in content:
        if isinstance(part, str):
            yield part
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        is_known = isinstance(kind, str) and kind in _TEXT_PARTS
        text = part.get(_TEXT_PARTS[kind]) if is_known else None
        if not isinstance(text, str):
            raise RequestError(
                f"messages[{index}].content holds a part of type {kind!r}; "
                "this model takes text parts",
                param="messages",
            )
        yield text


def _parse_arguments(call: Any, index: int) -> None:
    """Turns the JSON string of a tool call's arguments into the object that templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError(
            f"messages[{index}].tool_calls holds a call without a function", param="messages"
        )
    if not isinstance(arguments := function.get("arguments"), str):
        return
    try:
        function["arguments"] = _loads(arguments) if arguments else {}
    except ValueError as error:
        raise RequestError(
            f"messages[{index}].tool_calls has arguments that are not JSON: {error}",
            param="messages",
        ) from error


def _loads(text: str) -> Any:
    """Returns JSON of at most MAX_ARGUMENTS_DEPTH levels. Raises `ValueError`."""
    too_deep = ValueError(f"they nest deeper than {MAX_ARGUMENTS_DEPTH} levels")
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep from None
    level = [value]
    for _ in range(MAX_ARGUMENTS_DEPTH + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in level if _nests(one)]
        if not inner:
            return value
        level = [part for parts in inner for part in parts]
    raise too_deep


def _nests(value: Any) -> bool:
    return isinstance(value, dict | list)


def _tag_final(chat: list[dict[str, Any]], source: str) -> str:
    """Tags the end of the last message's text in place, and returns that text."""
    message = chat[-1]
    content = message.get("content")
    if "content" in source and isinstance(content, str):
        message["content"] = content + _CONTINUE
        return content
    if "content" in source and isinstance(content, list):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(text := part.get("text"), str):
                part["text"] = text + _CONTINUE
                return text
    raise RequestError(
        "continue_final_message is true, but the last message has no text to continue",
        param="continue_final_message",
    )


def _cut_at_tag(
    text: str,
    final: str,  # what the last message said
) -> str:
    """Returns `text` up to the end of the last message's text."""
    tag = text.rfind(_CONTINUE.strip())
    if tag < 0 or final.strip() not in text:
        raise RequestError(
            "continue_final_message is true, but the chat template drops or changes the last "
            "message's text",
            param="continue_final_message",
        )
    kept = text[:tag]
    # Without the blank after the tag the template has trimmed the message's end.
    return kept if text.startswith(_CONTINUE, tag) else kept.rstrip()
