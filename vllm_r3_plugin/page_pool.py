"""Memory for routing rows, in pages, and who refers to each page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int, Integer

from shared_schema import RoutingLayout, RowStatus
from vllm_r3_plugin.frozen_rows import NOWHERE
from vllm_r3_plugin.published_pages import PublishedPages


class PagePool:
    """Pages of ``page_size`` rows, which grow in number when they are needed.

    Page 0 takes what nobody wants. Any other is referred to by requests and pins, is published and
    kept for later hits, or is free.

    Args:
        layout: shape of a row.
        page_size: B, rows of a page.
        cached_pages: published pages at most, as long as requests do not refer to more.
        max_pages: pages at most. Pinned pages are kept in addition to both.

    Attributes:
        ids: ``[pages, B, L, k]`` in the narrow dtype.
        status: ``[pages, B]`` a :class:`RowStatus` of each row.
        published: pages that later prefix-cache hits may share.

    """

    def __init__(
        self, layout: RoutingLayout, page_size: int, cached_pages: int, max_pages: int
    ) -> None:
        self._soft_limit = max(1, min(cached_pages, max_pages))
        self._max_pages = max(1, max_pages)
        pages = 1 + self._soft_limit
        row = (layout.num_moe_layers, layout.top_k)
        self.ids = np.empty((pages, page_size, *row), layout.dtype)
        self.status = np.empty((pages, page_size), np.uint8)
        self.published = PublishedPages()
        self._references = np.zeros(pages, np.int32)
        self._pins = np.zeros(pages, np.int32)
        self._num_pinned = 0
        self._free: list[int] = []
        self._next = 1

    def __len__(self) -> int:
        """Pages that are not free."""
        return self._next - 1 - len(self._free)

    def new(self, count: int) -> Int[np.ndarray, " count"]:
        """Pages whose rows read as lost, each referred to once; 0 for those without room.

        Of those kept for hits, the least recently used are given up.
        """
        from_free = max(0, len(self._free) - count)
        found = self._free[from_free:]
        del self._free[from_free:]
        found += self._unused(count - len(found), self._soft_limit)
        if len(self.published) > self._soft_limit:
            found += self.published.evict(count - len(found))
        found += self._unused(count - len(found), self._max_pages)
        found += self.published.evict(count - len(found))
        found += [NOWHERE] * (count - len(found))
        pages = np.array(found, np.int64)
        self.status[pages] = RowStatus.STEP_LOST
        self._references[pages] = 1
        return pages

    def write(
        self, rows: Int[np.ndarray, " N"], ids: Integer[np.ndarray, "N L k"], status: RowStatus
    ) -> None:
        """Fill rows; row ``r`` is the one at ``r % page_size`` of page ``r // page_size``."""
        self.ids.reshape(-1, *self.ids.shape[2:])[rows] = ids
        self.status.reshape(-1)[rows] = status

    def copy_rows(self, source: int, page: int, count: int) -> None:
        """Copy the first ``count`` rows of a page to another."""
        self.ids[page, :count] = self.ids[source, :count]
        self.status[page, :count] = self.status[source, :count]

    def are_recorded(self, pages: Integer[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Whether all rows of each page are recorded; page 0 has none."""
        recorded: Bool[np.ndarray, " n"] = ~self.status[pages].any(1) & (pages != NOWHERE)
        return recorded

    def share(self, page: int) -> None:
        """Refer to a published page once more."""
        self._references[page] += 1
        self.published.unreferenced.pop(page, None)

    def drop(self, pages: Integer[np.ndarray, " n"]) -> None:
        """Take one reference from each of ``pages``, all of them different."""
        self._references[pages] -= 1
        for page in pages[self._references[pages] == 0].tolist():
            if page in self.published:
                self.published.unreferenced[page] = None
            else:
                self._free.append(page)

    def withdraw(self, pages: Iterable[int]) -> None:
        """Let no later hit share these pages."""
        self._free += self.published.remove(pages)

    def withdraw_all(self) -> None:
        """Let no later hit share any page."""
        self._free.extend(self.published.unreferenced)
        self.published.clear()

    def pin(self, pages: Integer[np.ndarray, " n"]) -> None:
        """Keep pages, also when no request refers to them, until they are unpinned."""
        self._references[pages] += 1
        self._pins[pages] += 1
        self._num_pinned += len(pages)

    def unpin(self, pages: Integer[np.ndarray, " n"]) -> None:
        """Undo one :meth:`pin`."""
        self._pins[pages] -= 1
        self._num_pinned -= len(pages)
        self.drop(pages)

    def repair(self, referred_to: Integer[np.ndarray, "..."]) -> None:
        """Count anew, after an exception: these pages are those of all requests, some of them 0."""
        self._references[:] = np.bincount(referred_to.ravel(), minlength=len(self._references))
        self._references += self._pins
        self._references[NOWHERE] = 0
        pages = np.flatnonzero(self._references[: self._next] == 0)[1:].tolist()
        self.published.repair(pages)
        self._free = [page for page in pages if page not in self.published]

    def _unused(self, count: int, limit: int) -> Sequence[int]:
        """Pages never used before, as long as there are at most ``limit`` beside pinned ones."""
        stop = min(self._next + count, 1 + min(limit, self._max_pages) + self._num_pinned)
        while stop > len(self.ids):
            try:
                self._grow()
            except MemoryError:
                stop = len(self.ids)
                self._max_pages = stop - 1
        found = range(self._next, stop)
        self._next += len(found)
        return found

    def _grow(self) -> None:
        pages = min(2 * len(self.ids), 1 + self._max_pages + self._num_pinned)
        # All of them or none: memory may be refused.
        grown = {}
        for name in ("ids", "status", "_references", "_pins"):
            old = getattr(self, name)
            grown[name] = np.zeros((pages, *old.shape[1:]), old.dtype)
            grown[name][: len(old)] = old
        vars(self).update(grown)
