"""POST /tokenize and /detokenize, GET /tokenizer_info: a tokenizer for clients without one."""

from __future__ import annotations

from functools import partial

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.server.body import read_body
from jaxserve.server.events import JSON
from jaxserve.server.generate import off_loop
from jaxserve.server.protocol.tokenization import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
    TokenizerInfo,
)
from jaxserve.server.state import ServerState
from jaxserve.server.templates import template_for
from jaxserve.text.chat_template import encode_chat
from jaxserve.text.tokenizer import Tokenizer

_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(http: HttpRequest) -> Response:
    """Returns the tokens of a text or of a conversation."""
    state: ServerState = http.app.state.server
    body = await read_body(http, _tokenize_decoder)
    state.model_name_for(body.model)
    body.check()
    _, info, _ = state.loaded()
    tokens, texts = await off_loop(
        partial(_encode, body, state),
        len(await http.body()),
        is_slow=body.chat_template is not None,  # waits for a process
    )
    return JSON(
        Tokenized(
            count=len(tokens),
            max_model_len=info.max_model_len,
            tokens=tokens,
            token_strs=texts,
        )
    )


async def detokenize(http: HttpRequest) -> Response:
    """Returns the text of tokens; a token outside the vocabulary has none."""
    state: ServerState = http.app.state.server
    body = await read_body(http, _detokenize_decoder)
    state.model_name_for(body.model)
    if negative := [token for token in body.tokens if token < 0]:
        raise RequestError(f"tokens holds {negative[0]}; tokens are not negative", param="tokens")
    _, _, text = state.loaded()
    decode = partial(text.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return JSON(Detokenized(prompt=await off_loop(decode, len(body.tokens))))


async def tokenizer_info(http: HttpRequest) -> Response:
    """Returns what a tokenizer_config.json would say."""
    state: ServerState = http.app.state.server
    _, info, text = state.loaded()
    tokenizer = text.tokenizer
    return JSON(
        TokenizerInfo(
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            unk_token=tokenizer.unk_token,
            vocab_size=tokenizer.vocab_size,
            model_max_length=info.max_model_len,
            chat_template=None if text.chat_template is None else text.chat_template.source,
        )
    )


def _encode(body: TokenizeRequest, state: ServerState) -> tuple[list[int], list[str] | None]:
    """Returns the tokens, and each one's text where the client asks for that."""
    _, _, text = state.loaded()
    tokens = _tokens(body, state, text.tokenizer)
    return tokens, list(map(text.tokenizer.token_text, tokens)) if body.return_token_strs else None


def _tokens(body: TokenizeRequest, state: ServerState, tokenizer: Tokenizer) -> list[int]:
    if body.prompt is not None:
        has_bos = body.add_special_tokens is not False
        return tokenizer.encode(body.prompt, add_special_tokens=has_bos)
    return encode_chat(
        template_for(body.chat_template, state),
        tokenizer,
        body.messages or [],
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables=body.chat_template_kwargs,
        add_special_tokens=bool(body.add_special_tokens),
    ).tokens
