"""What the store of responses keeps and drops."""

import pytest

from jaxserve.errors import NotFound
from jaxserve.server.response_store import ResponseStore, StoredResponse


def stored(size: int) -> StoredResponse:
    return StoredResponse(response=b"r" * (size - 1), items=b"i")


def kept(store: ResponseStore, *names: str) -> list[str]:
    found = []
    for name in names:
        try:
            store.get(name, "id")
        except NotFound:
            continue
        found.append(name)
    return found


def test_bytes_are_bounded_and_freed():
    store = ResponseStore(max_responses=10, max_bytes=100)
    for name in "abc":
        store.put(name, stored(40))
    assert kept(store, *"abc") == ["b", "c"]
    store.delete("b", "id")
    store.put("d", stored(60))
    assert kept(store, *"cd") == ["c", "d"]


def test_a_response_larger_than_the_store_drops_nothing():
    store = ResponseStore(max_responses=10, max_bytes=100)
    store.put("a", stored(40))
    store.put("b", stored(101))
    assert kept(store, *"ab") == ["a"]


def test_an_unknown_response_is_named_with_its_field():
    store = ResponseStore(max_responses=0, max_bytes=100)
    store.put("a", stored(1))
    with pytest.raises(NotFound, match="max_stored_responses is 0") as refused:
        store.get("a", "previous_response_id")
    assert refused.value.param == "previous_response_id"
