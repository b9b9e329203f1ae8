"""Which chat template renders a request: the server's, or its own where that is allowed."""

from __future__ import annotations

from jaxserve.errors import ConfigError, RequestError
from jaxserve.server.state import ServerState
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.isolated_template import MAX_TEMPLATE_CHARS


def template_for(
    source: str | None,  # the request's own
    state: ServerState,
) -> ChatTemplate:
    """Returns the template. Raises `RequestError` if there is none, or it may not be taken."""
    _, _, text = state.loaded()
    if source is None:
        if text.chat_template is None:
            raise RequestError(
                "the model has no chat template; see --chat-template", param="messages"
            )
        return text.chat_template
    if not state.config.trust_request_chat_template:
        raise RequestError(
            "chat_template is taken from requests only with --trust-request-chat-template",
            param="chat_template",
        )
    if len(source) > MAX_TEMPLATE_CHARS:
        raise RequestError(
            f"chat_template has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}",
            param="chat_template",
        )
    special_tokens = text.tokenizer.special_tokens
    try:
        return ChatTemplate(source, special_tokens=special_tokens, is_isolated=True)
    except ConfigError as error:
        raise RequestError(str(error), param="chat_template") from error
