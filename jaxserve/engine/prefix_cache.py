"""Finds pages that already hold the keys and values of a prompt's first tokens.

A page is known by a digest of all tokens up to its end, so equal digests mean equal content:
digest[i] = sha256(digest[i - 1], tokens of page i), and digest[-1] = sha256(salt).

Host only: imports no jax.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def extend_digests(
    digests: list[bytes],  # [pages known so far], grows in place
    tokens: Sequence[int],  # at least num_pages * page_size of them
    num_pages: int,
    *,
    page_size: int,
    salt: str,
) -> None:
    """Adds the digests of full pages up to `num_pages`; costs nothing for those already there."""
    if len(digests) >= num_pages:
        return
    assert len(tokens) >= num_pages * page_size, f"{len(tokens)=} {num_pages=} {page_size=}"
    if digests:
        parent = digests[-1]
    else:
        # A lone surrogate is legal in a JSON string and must not stop the engine.
        parent = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
    for index in range(len(digests), num_pages):
        page_tokens = array("i", tokens[index * page_size : (index + 1) * page_size])
        parent = hashlib.sha256(parent + page_tokens.tobytes()).digest()
        digests.append(parent)


class PrefixCache:
    """Maps digests to pages, one to one. Holds no page: a free page is hit until it is reused.

    Turned off (`enabled=False`) it stays empty and hits nothing. Owned by the engine thread.
    """

    def __init__(self, page_size: int, *, enabled: bool = True) -> None:
        assert page_size > 0, f"{page_size=}"
        self.page_size = page_size
        self.enabled = enabled
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    def lookup(
        self,
        digests: list[bytes],  # of `tokens`, grows in place
        tokens: Sequence[int],
        salt: str,
    ) -> list[int]:
        """Returns the pages of the longest known prefix; at least one token is left to compute."""
        if not self.enabled:
            return []
        num_pages = (len(tokens) - 1) // self.page_size
        extend_digests(digests, tokens, num_pages, page_size=self.page_size, salt=salt)
        pages = []
        for digest in digests[:num_pages]:
            if (page := self._page_of.get(digest)) is None:
                break
            pages.append(page)
        return pages

    def register(
        self,
        digests: list[bytes],  # of `tokens`, grows in place
        tokens: Sequence[int],
        salt: str,
        pages: Sequence[int],
        first: int,
    ) -> None:
        """Makes pages[first:] known: they are full, and a later step may read them.

        `pages` are those of a sequence from its start. Where equal content is known on another
        page already, that page stays the known one.
        """
        if not self.enabled:
            return
        extend_digests(digests, tokens, len(pages), page_size=self.page_size, salt=salt)
        for page, digest in zip(pages[first:], digests[first : len(pages)], strict=True):
            if digest not in self._page_of:
                assert page not in self._digest_of, f"{page=} is known by another digest"
                self._page_of[digest] = page
                self._digest_of[page] = digest

    def evict(self, pages: Sequence[int]) -> None:
        """Forgets pages that are about to be overwritten."""
        if not self._digest_of:
            return
        for page in pages:
            digest = self._digest_of.pop(page, None)
            if digest is not None:
                del self._page_of[digest]

    def check(self) -> None:
        """Asserts that the two maps are each other's inverse."""
        inverse = {digest: page for page, digest in self._digest_of.items()}
        assert inverse == self._page_of, f"{len(inverse)=} {len(self._page_of)=}"
