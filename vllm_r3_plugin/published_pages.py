"""Pages of rows that later prefix-cache hits may share, by the tokens that they belong to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable

from vllm_r3_plugin.frozen_rows import NOWHERE


class PublishedPages:
    """Page of each key, and the KV block that its rows belong to.

    Attributes:
        unreferenced: pages that no request refers to, least recently used first.

    """

    def __init__(self) -> None:
        self.unreferenced: OrderedDict[int, None] = OrderedDict()
        self._page_of_key: dict[Hashable, int] = {}
        self._key_of_page: dict[int, Hashable] = {}
        self._block_of_page: dict[int, int] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._key_of_page

    def find(self, key: Hashable) -> int:
        """The page of a key, whatever its KV block; ``NOWHERE`` if there is none."""
        return self._page_of_key.get(key, NOWHERE)

    def find_for_hit(self, key: Hashable, block: int | None) -> int:
        """The page whose rows belong to ``block``; ``NOWHERE`` if there is none.

        None is a block into which KV was copied or loaded: the page's rows then belong to several
        blocks.
        """
        page = self.find(key)
        if block is None:
            self._block_of_page.pop(page, None)
        elif self._block_of_page.get(page, block) != block:
            return NOWHERE
        return page

    def add(self, page: int, key: Hashable, block: int | None) -> None:
        """Publish a page under a key that has none."""
        if block is not None:
            self._block_of_page[page] = block
        self._key_of_page[page] = key
        self._page_of_key[key] = page  # last: what repair() trusts

    def remove(self, page: int) -> bool:
        """Withdraw a page; says whether no request refers to it."""
        del self._page_of_key[self._key_of_page.pop(page)]
        self._block_of_page.pop(page, None)
        was_unreferenced = page in self.unreferenced
        self.unreferenced.pop(page, None)
        return was_unreferenced

    def clear(self) -> None:
        """Withdraw all."""
        self.unreferenced.clear()
        self._page_of_key.clear()
        self._key_of_page.clear()
        self._block_of_page.clear()

    def repair(self, unreferenced: Iterable[int]) -> None:
        """Rebuild all from the keys, after an exception that may have left a change half done."""
        self._key_of_page = {page: key for key, page in self._page_of_key.items()}
        blocks = self._block_of_page.items()
        self._block_of_page = {page: block for page, block in blocks if page in self}
        published = [page for page in unreferenced if page in self]
        # The order of those that were in it is kept.
        order = {page: place for place, page in enumerate(self.unreferenced)}
        published.sort(key=lambda page: order.get(page, len(order)))
        self.unreferenced = OrderedDict.fromkeys(published)
