"""Where the rows of a request are in the pages of the store, and how they are read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt, UInt8

from shared_schema import RoutingLayout, RowStatus

NOWHERE = 0
"""Page 0 takes the rows that nobody wants, so that a write needs no mask; slot 0 owns only it."""

Rows = tuple[UInt[np.ndarray, "T L k"], UInt8[np.ndarray, " T"]]
"""Ids, and the status of each row."""


class FrozenRows(NamedTuple):
    """Rows at positions ``start`` … ``stop - 1`` of a request, which change no more.

    What else happens to the request does not touch them. Their pages stay for as long as they are
    pinned, or until the request is released or admitted again.

    Attributes:
        start: position of the first row.
        stop: position after the last row.
        pages: ``[n]`` page of each ``page_size`` positions, from that of ``start``.
        floor: tokens before it hit the prefix cache.
        kept: rows from position 0 that come before those of the pages.
        missing: status of rows that have no page.

    """

    start: int
    stop: int
    pages: Int[np.ndarray, " n"]
    floor: int
    kept: Rows | None
    missing: RowStatus

    def read(
        self,
        start: int,
        stop: int,
        pool: UInt[np.ndarray, "pages B L k"],
        statuses: UInt8[np.ndarray, "pages B"],
        layout: RoutingLayout,
    ) -> Rows:
        """Copies of the rows at positions ``start`` … ``stop - 1``, all of them among these."""
        pages, within = self._pages(start, stop, pool.shape[1])
        status = self.read_status(start, stop, statuses)
        ids = pool[pages].reshape(-1, *pool.shape[2:])[within]
        if self.kept is not None:
            kept_ids = self.kept[0][start:stop]
            ids[: len(kept_ids)] = kept_ids
        if ids.size and layout.num_experts <= ids.max():
            beyond = (ids >= layout.num_experts).any((1, 2))
            status[beyond & (status == RowStatus.RECORDED)] = RowStatus.INVALID
        if status.any():
            ids[status != RowStatus.RECORDED] = layout.fill_id
        return ids, status

    def read_status(
        self, start: int, stop: int, statuses: UInt8[np.ndarray, "pages B"]
    ) -> UInt8[np.ndarray, " T"]:
        """Status of each of these rows, before a look at its ids."""
        pages, within = self._pages(start, stop, statuses.shape[1])
        by_page: UInt8[np.ndarray, "n B"] = statuses[pages]
        by_page[pages == NOWHERE] = self.missing
        status: UInt8[np.ndarray, " T"] = by_page.reshape(-1)[within]
        if start < self.floor:
            hits = status[: self.floor - start]
            hits[hits == RowStatus.STEP_LOST] = RowStatus.EVICTED
        if self.kept is not None:
            kept_status = self.kept[1][start:stop]
            status[: len(kept_status)] = kept_status
        return status

    def _pages(self, start: int, stop: int, size: int) -> tuple[Int[np.ndarray, " n"], slice]:
        """Pages of these rows, and which of the pages' rows they are."""
        first = start // size
        skipped = self.start // size
        pages = self.pages[first - skipped : -(-stop // size) - skipped]
        return pages, slice(start - first * size, stop - first * size)
