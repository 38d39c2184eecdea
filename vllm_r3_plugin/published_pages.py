"""Pages of rows that later prefix-cache hits may share, by the tokens that they belong to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable

from vllm_r3_plugin.frozen_rows import NOWHERE

FullPage = tuple[int, Hashable, int | None]
"""A page, the key of its tokens, and the KV block that its rows belong to, if it is known."""


class PublishedPages:
    """Page of each key, and the KV block that its rows belong to.

    Attributes:
        unreferenced: pages that no request refers to, least recently used first.

    """

    def __init__(self) -> None:
        self.unreferenced: OrderedDict[int, None] = OrderedDict()
        self._of_key: dict[Hashable, FullPage] = {}
        self._key_of_page: dict[int, Hashable] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._key_of_page

    def find(self, key: Hashable) -> int:
        """The page of a key, whatever its KV block; ``NOWHERE`` if there is none."""
        return self._of_key.get(key, (NOWHERE,))[0]

    def find_for_hit(self, key: Hashable, block: int | None) -> int:
        """The page whose rows belong to ``block``; ``NOWHERE`` if there is none.

        None is a block into which KV was copied or loaded: the page's rows then belong to several
        blocks.
        """
        if key not in self._of_key:
            return NOWHERE
        page, _, its_block = self._of_key[key]
        if block is None:
            self._of_key[key] = page, key, None
        elif its_block not in (None, block):
            return NOWHERE
        return page

    def add(self, pages: Iterable[FullPage]) -> list[FullPage]:
        """Publish pages under keys that have none; returns those whose key another page has."""
        of_key, key_of_page = self._of_key, self._key_of_page
        others = []
        for one in pages:
            page, key, _ = one
            if page in key_of_page:
                continue
            if of_key.setdefault(key, one) is one:  # first: what repair() trusts
                key_of_page[page] = key
            else:
                others.append(one)
        return others

    def remove(self, page: int) -> bool:
        """Withdraw a page; says whether no request refers to it."""
        del self._of_key[self._key_of_page.pop(page)]
        was_unreferenced = page in self.unreferenced
        self.unreferenced.pop(page, None)
        return was_unreferenced

    def evict(self, count: int) -> list[int]:
        """Withdraw ``count`` pages that no request refers to, or as many as there are."""
        unreferenced = self.unreferenced
        pages = [unreferenced.popitem(last=False)[0] for _ in range(min(count, len(unreferenced)))]
        for key in map(self._key_of_page.pop, pages):
            del self._of_key[key]
        return pages

    def clear(self) -> None:
        """Withdraw all."""
        self.unreferenced.clear()
        self._of_key.clear()
        self._key_of_page.clear()

    def repair(self, unreferenced: Iterable[int]) -> None:
        """Rebuild all from the keys, after an exception that may have left a change half done."""
        self._key_of_page = {page: key for page, key, _ in self._of_key.values()}
        published = [page for page in unreferenced if page in self]
        # The order of those that were in it is kept.
        order = {page: place for place, page in enumerate(self.unreferenced)}
        published.sort(key=lambda page: order.get(page, len(order)))
        self.unreferenced = OrderedDict.fromkeys(published)
