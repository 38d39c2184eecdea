"""Reads rows in a thread of its own, so that the engine core does not wait for the copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from vllm_r3_plugin.frozen_rows import FrozenRows
from vllm_r3_plugin.page_store import PageStore

T = TypeVar("T")


class RowReader:
    """One thread that reads frozen rows, one call after the other.

    All methods are for the thread that calls the store. Rows stay pinned while a call with them is
    waiting or running; they are unpinned by :meth:`release`, not by the reading thread.
    """

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moe-r3-rows")
        self._reads: deque[tuple[FrozenRows, Future[Any]]] = deque()

    def submit(self, rows: FrozenRows, read: Callable[[], T]) -> Future[T]:
        """Call ``read``, which may read ``rows``, in the thread."""
        self._store.pin(rows)
        future = self._thread.submit(read)
        self._reads.append((rows, future))
        return future

    def release(self) -> None:
        """Unpin the rows of calls that are done."""
        while self._reads and self._reads[0][1].done():
            self._store.unpin(self._reads.popleft()[0])

    def shutdown(self) -> None:
        """Finish what is waiting, and stop."""
        self._thread.shutdown()
