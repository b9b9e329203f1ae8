"""/v1/models: the names that requests may use."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import NotFound
from jaxserve.server.events import JSON
from jaxserve.server.state import ServerState


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One name."""

    id: str
    created: int
    root: str
    max_model_len: int
    tool_call_parser: str
    reasoning_parser: str
    object: str = "model"
    owned_by: str = "jaxserve"
    parent: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelList:
    """Every name."""

    data: list[ModelCard]
    object: str = "list"


def _cards(state: ServerState) -> list[ModelCard]:
    _, info, text = state.loaded()
    return [
        ModelCard(
            id=name,
            created=state.created,
            root=state.root,
            max_model_len=info.max_model_len,
            tool_call_parser=text.format.tools_name,
            reasoning_parser=text.format.reasoning_name,
        )
        for name in state.model_names
    ]


async def list_models(http: HttpRequest) -> Response:
    """Returns a card for each name."""
    return JSON(ModelList(data=_cards(http.app.state.server)))


async def get_model(http: HttpRequest) -> Response:
    """Returns the card of one name; names may hold slashes."""
    state: ServerState = http.app.state.server
    name = http.path_params["model"]
    for card in _cards(state):
        if card.id == name:
            return JSON(card)
    raise NotFound(f"no model is named {name[:200]!r}", param="model")
