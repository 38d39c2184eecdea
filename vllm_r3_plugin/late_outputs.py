"""Large rows leave the engine core behind the other outputs of their step, request by request."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from queue import Queue
from typing import Any

import msgspec
import numpy as np

from vllm_r3_plugin.frozen_rows import FrozenRows
from vllm_r3_plugin.in_flight import rows_array
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.page_store import PageStore
from vllm_r3_plugin.row_reader import RowReader

Account = Callable[[np.ndarray[Any, Any]], None]
"""Takes the status of each row that was read."""


class LateOutputs:
    """Last outputs of requests whose rows are read by another thread.

    A hundred long requests that end together would keep the engine core from its next step for the
    time of copying gigabytes, and all other requests' tokens of the step from being sent.
    """

    def __init__(self, reader: RowReader, journal: Journal) -> None:
        self._reader = reader
        self._journal = journal
        self._put_off: dict[str, tuple[PageStore, FrozenRows, Account]] = {}
        self._reading: set[str] = set()

    def __contains__(self, request_id: str) -> bool:
        """Whether rows of this request have not been read yet."""
        return request_id in self._reading or request_id in self._put_off

    def put_off(
        self, request_id: str, store: PageStore, rows: FrozenRows, account: Account
    ) -> None:
        """Leave ``rows`` out of the step's outputs; ``account`` is called when they were read."""
        store.pin(rows)
        self._put_off[request_id] = store, rows, account

    def send(self, outputs: dict[int, Any], queue: Queue[Any] | None) -> None:
        """Move outputs whose rows were put off from ``outputs`` to ``queue``, by and by.

        Args:
            outputs: of a step, by client, with all that vLLM adds to them.
            queue: takes ``(client, outputs)``; without one the rows are read here and now.

        """
        if not self._put_off:
            return
        for client, core_outputs in outputs.items():
            core_outputs.outputs = [
                output
                for output in core_outputs.outputs
                if output.request_id not in self._put_off
                or not self._sends(client, core_outputs, output, queue)
            ]
        for store, rows, _ in self._put_off.values():
            store.unpin(rows)
        self._put_off.clear()

    def _sends(self, client: int, of: Any, output: Any, queue: Queue[Any] | None) -> bool:
        """Whether ``output`` leaves later; if not, it has its rows, or an error has cost them."""
        store, rows, account = self._put_off[output.request_id]
        with self._journal.guard("reading the rows of requests that have ended"):
            if queue is None:
                account(_fill(output, store, rows))
                return False
            message = msgspec.structs.replace(
                of, outputs=[output], scheduler_stats=None, finished_requests=None
            )
            self._reader.submit(
                store,
                rows,
                partial(self._fill_and_send, output, store, rows, (client, message), queue),
                partial(self._done, output.request_id, account),
            )
            self._reading.add(output.request_id)
            return True
        return False

    def _fill_and_send(
        self,
        output: Any,
        store: PageStore,
        rows: FrozenRows,
        entry: tuple[int, Any],
        queue: Queue[Any],
    ) -> np.ndarray[Any, Any] | None:
        status = None
        with self._journal.guard("reading the rows of a request that has ended"):
            status = _fill(output, store, rows)
        queue.put_nowait(entry)
        return status

    def _done(self, request_id: str, account: Account, status: np.ndarray[Any, Any] | None) -> None:
        self._reading.discard(request_id)
        if status is not None:
            account(status)


def _fill(output: Any, store: PageStore, rows: FrozenRows) -> np.ndarray[Any, Any]:
    ids, status = store.read_frozen(rows, rows.start, rows.stop)
    output.routed_experts = rows_array(ids, status)
    return status
