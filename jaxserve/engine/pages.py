"""Which KV pages are free, and how many sequences hold each of the others.

Host only: imports no jax.
"""

from __future__ import annotations

from collections.abc import Sequence


class PagePool:
    """Hands out pages by number and takes them back: free + used = all, always.

    Free pages form a doubly linked list through two arrays, so that a page in its middle can be
    shared again in O(1) while its content is still of use. The page that was freed longest ago
    is taken first. Owned by the engine thread.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0, f"{num_pages=}"
        self.num_pages = num_pages
        self._num_free = num_pages
        self._num_holders = [0] * num_pages  # [pages]
        # A ring: entry `num_pages` stands before the first free page and after the last.
        self._next = [*range(1, num_pages + 1), 0]  # [pages + 1]
        self._previous = [num_pages, *range(num_pages)]  # [pages + 1]

    @property
    def num_free(self) -> int:
        """The number of pages that no sequence holds."""
        return self._num_free

    def take(self, count: int) -> list[int] | None:
        """Takes `count` free pages, or none at all: returns None when the pool is short.

        Whatever the pages held is lost: the prefix cache must forget them.
        """
        if count > self._num_free:
            return None
        end = self.num_pages
        pages = []
        page = self._next[end]
        for _ in range(count):
            pages.append(page)
            self._num_holders[page] = 1
            page = self._next[page]
        self._next[end] = page
        self._previous[page] = end
        self._num_free -= count
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds a holder to each page, free or not; the content stays."""
        for page in pages:
            if self._num_holders[page] == 0:
                before, after = self._previous[page], self._next[page]
                self._next[before] = after
                self._previous[after] = before
                self._num_free -= 1
            self._num_holders[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Removes a holder from each page; a page without holders is free.

        The last page goes first, so that the tail of a sequence is reused before its head: a
        prefix without its tail can still be hit, a tail without its head cannot.
        """
        end = self.num_pages
        for page in reversed(pages):
            assert self._num_holders[page] > 0, f"{page=} is free already"
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                last = self._previous[end]
                self._next[last] = page
                self._previous[page] = last
                self._next[page] = end
                self._previous[end] = page
                self._num_free += 1

    def count_free(self, pages: Sequence[int]) -> int:
        """Returns how many of `pages` nobody holds."""
        return sum(self._num_holders[page] == 0 for page in pages)

    def num_holders_of(self, page: int) -> int:
        """Returns how many sequences hold `page`."""
        return self._num_holders[page]

    def check(self) -> None:
        """Asserts that the free list and the holders agree on every page."""
        end = self.num_pages
        free: list[int] = []
        page = self._next[end]
        while page != end and len(free) <= self.num_pages:
            assert self._previous[self._next[page]] == page, f"{page=} is badly linked"
            free.append(page)
            page = self._next[page]
        assert len(free) == len(set(free)) == self._num_free, f"{free=} {self._num_free=}"
        assert all(self._num_holders[page] == 0 for page in free), f"{free=} has holders"
        num_used = sum(count > 0 for count in self._num_holders)
        assert min(self._num_holders) >= 0, f"{self._num_holders=}"
        assert num_used + self._num_free == self.num_pages, f"{num_used=} {self._num_free=}"
