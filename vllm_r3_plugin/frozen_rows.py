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
        size = pool.shape[1]
        first = start // size
        pages = self.pages[first - self.start // size : -(-stop // size) - self.start // size]
        within = slice(start - first * size, stop - first * size)
        status = statuses[pages]
        status[pages == NOWHERE] = self.missing
        flat_status = status.reshape(-1)[within]
        hits = flat_status[: max(0, self.floor - start)]
        hits[hits == RowStatus.STEP_LOST] = RowStatus.EVICTED
        ids = pool[pages].reshape(-1, *pool.shape[2:])[within]
        if self.kept is not None:
            kept_ids, kept_status = self.kept
            num_kept = max(0, min(stop, len(kept_status)) - start)
            ids[:num_kept] = kept_ids[start : start + num_kept]
            flat_status[:num_kept] = kept_status[start : start + num_kept]
        if ids.size and layout.num_experts <= ids.max():
            beyond = (ids >= layout.num_experts).any((1, 2))
            flat_status[beyond & (flat_status == RowStatus.RECORDED)] = RowStatus.INVALID
        if flat_status.any():
            ids[flat_status != RowStatus.RECORDED] = layout.fill_id
        return ids, flat_status
