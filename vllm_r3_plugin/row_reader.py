"""Reads rows in a thread of its own, so that the engine core does not wait for the copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from vllm_r3_plugin.frozen_rows import FrozenRows
from vllm_r3_plugin.page_store import PageStore

T = TypeVar("T")


class _Read(NamedTuple):
    store: PageStore
    rows: FrozenRows
    future: Future[Any]
    then: Callable[[Any], None] | None


class RowReader:
    """One thread that reads frozen rows, one call after the other.

    All methods are for the thread that calls the store. Rows stay pinned while a call with them is
    waiting or running; they are unpinned by :meth:`release`, not by the reading thread.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="moe-r3-rows")
        self._reads: deque[_Read] = deque()

    def submit(
        self,
        store: PageStore,
        rows: FrozenRows,
        read: Callable[[], T],
        then: Callable[[T], None] | None = None,
    ) -> Future[T]:
        """Call ``read``, which may read ``rows`` from ``store``, in the thread.

        ``then`` gets what it returned, in :meth:`release`.
        """
        store.pin(rows)
        future = self._thread.submit(read)
        self._reads.append(_Read(store, rows, future, then))
        return future

    def release(self) -> None:
        """Unpin the rows of calls that are done."""
        while self._reads and self._reads[0].future.done():
            store, rows, future, then = self._reads.popleft()
            store.unpin(rows)
            if then is not None and future.exception() is None:
                then(future.result())

    def shutdown(self) -> None:
        """Finish what is waiting, and stop."""
        self._thread.shutdown()
