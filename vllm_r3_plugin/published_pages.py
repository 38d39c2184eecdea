"""Pages of rows that later prefix-cache hits may share, by the tokens that they belong to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from itertools import islice

from vllm_r3_plugin.frozen_rows import NOWHERE

FullPage = tuple[int, Hashable, int | None]
"""A page, the key of its tokens, and the KV block that its rows belong to, if it is known."""


class PublishedPages:
    """Page of each KV block, and of each key one that stands for all of its blocks.

    Attributes:
        unreferenced: pages that no request refers to, least recently used first.

    """

    def __init__(self) -> None:
        self.unreferenced: OrderedDict[int, None] = OrderedDict()
        self._of_page: dict[int, FullPage] = {}
        self._of_key: dict[Hashable, int] = {}
        self._of_block: dict[int, int] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._of_page

    def __len__(self) -> int:
        return len(self._of_page)

    def find(self, key: Hashable) -> int:
        """The page that stands for a key; ``NOWHERE`` if there is none."""
        return self._of_key.get(key, NOWHERE)

    def take_blocks(self, blocks: Iterable[int]) -> list[int]:
        """Forget KV blocks; returns the pages whose rows belong to one of them alone."""
        take = self._of_block.pop
        pages = [take(block, NOWHERE) for block in blocks]
        return [page for page in pages if page != NOWHERE]

    def find_for_hit(self, key: Hashable, block: int | None) -> int:
        """The page whose rows belong to ``block``; ``NOWHERE`` if there is none.

        None is a block into which KV was copied or loaded: the page's rows then belong to several
        blocks.
        """
        page = NOWHERE if block is None else self._of_block.get(block, NOWHERE)
        if page == NOWHERE:
            page = self.find(key)
            if page == NOWHERE:
                return NOWHERE
            its_block = self._of_page[page][2]
            if block is None and its_block is not None:
                self._of_page[page] = page, key, None
                del self._of_block[its_block]
            elif its_block is not None:
                return NOWHERE
        return page

    def add(self, pages: Iterable[FullPage]) -> list[FullPage]:
        """Publish pages; returns those for whose key another page stands.

        Where their block is not known either, they are not published.
        """
        of_page, of_key, of_block = self._of_page, self._of_key, self._of_block
        others = []
        for one in pages:
            page, key, block = one
            if page in of_page:
                continue
            if of_key.setdefault(key, page) != page:
                others.append(one)
                if block is None:
                    continue
            if block is not None:
                of_block[block] = page
            of_page[page] = one  # last: what repair() trusts
        return others

    def let_stand(self, full: FullPage) -> None:
        """Publish a page that stands for its key from now on."""
        page, key, _ = full
        self._of_key[key] = page
        self._of_page[page] = full

    def has_block(self, page: int) -> bool:
        """Whether the rows of a page belong to one KV block alone."""
        return self._of_page[page][2] is not None

    def remove(self, pages: Iterable[int]) -> list[int]:
        """Withdraw pages; returns those that no request refers to."""
        of_page, of_key, of_block = self._of_page, self._of_key, self._of_block
        unreferenced = self.unreferenced
        found: list[int] = []
        for page in pages:
            _, key, block = of_page.pop(page)
            if of_key.get(key) == page:
                del of_key[key]
            if block is not None:
                of_block.pop(block, None)
            if page in unreferenced:
                del unreferenced[page]
                found.append(page)
        return found

    def evict(self, count: int) -> list[int]:
        """Withdraw ``count`` pages that no request refers to, or as many as there are."""
        return self.remove(list(islice(self.unreferenced, max(0, count))))

    def clear(self) -> None:
        """Withdraw all."""
        self.unreferenced.clear()
        self._of_page.clear()
        self._of_key.clear()
        self._of_block.clear()

    def repair(self, unreferenced: Iterable[int]) -> None:
        """Rebuild all from the pages, after an exception that may have left a change half done."""
        self._of_key = {key: page for key, page in self._of_key.items() if page in self}
        full = self._of_page.values()
        self._of_block = {block: page for page, _, block in full if block is not None}
        published = [page for page in unreferenced if page in self]
        # The order of those that were in it is kept.
        order = {page: place for place, page in enumerate(self.unreferenced)}
        published.sort(key=lambda page: order.get(page, len(order)))
        self.unreferenced = OrderedDict.fromkeys(published)
