"""Sends rows from the engine core: with a step's outputs, behind them, or held to be fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from shared_schema import RoutingLayout, RowStatus
from vllm_r3_plugin import metrics
from vllm_r3_plugin.in_flight import rows_array, void_array
from vllm_r3_plugin.journal import Guard, Journal
from vllm_r3_plugin.late_outputs import LateOutputs
from vllm_r3_plugin.out_of_band import OutOfBand
from vllm_r3_plugin.page_store import PageStore
from vllm_r3_plugin.received_rows import why_incomplete
from vllm_r3_plugin.tracked_request import TrackedRequest

_READ_AT_ONCE = 1 << 20
"""Bytes of rows that leave with the outputs of a step; those of further requests leave later."""


class RowSender:
    """Collects the rows of requests that end and puts them into vLLM's outputs.

    The store is an argument of every call: after an error another one may take its place.

    Attributes:
        riding: requests that send rows along with each of their outputs.

    """

    def __init__(
        self,
        layout: RoutingLayout,
        tracked: Mapping[str, TrackedRequest],
        out_of_band: OutOfBand,
        late: LateOutputs,
        journal: Journal,
        guard: Callable[[str, Iterable[str]], Guard],
    ) -> None:
        self._layout = layout
        self._tracked = tracked
        self._out_of_band = out_of_band
        self._late = late
        self._journal = journal
        self._guard = guard
        self.riding: set[str] = set()
        self._outgoing: dict[str, np.ndarray[Any, Any]] = {}
        self._outgoing_nbytes = 0

    def collect(self, store: PageStore, request: Any) -> None:
        """Take the rows of a request that ends with this step."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not tracked.is_returned:
            return
        nbytes = (request.num_tokens - 1 - tracked.sent) * self._layout.row_nbytes
        if request.request_id in self._out_of_band:
            self.hold(store, tracked)
        elif self._outgoing and self._outgoing_nbytes + nbytes > _READ_AT_ONCE:
            self._put_off(store, tracked)
        elif (rows := self.take(store, tracked)) is not None:
            self._outgoing[request.request_id] = rows
            self._outgoing_nbytes += nbytes
        tracked.kept = request.num_tokens - 1

    def take(self, store: PageStore, tracked: TrackedRequest) -> np.ndarray[Any, Any] | None:
        """Rows due since the last call, or None if there are none to return."""
        request = tracked.request
        start, stop = tracked.sent, request.num_tokens - 1
        if not tracked.is_returned or stop < start:
            return None
        ids, status = store.read(request.request_id, start, stop)
        tracked.sent = stop
        self._account(tracked, start, status)
        return rows_array(ids, status)

    def hold(self, store: PageStore, tracked: TrackedRequest) -> None:
        """Keep the rows of a request that ends here, to be fetched."""
        request_id, stop = tracked.request.request_id, tracked.request.num_tokens - 1
        rows = self._out_of_band.hold(request_id, stop)
        tracked.sent = stop
        if rows is not None:
            self._account(tracked, rows.start, store.status_of(rows))

    def hold_if_ended_by_stop_string(self, store: PageStore, request: Any) -> None:
        """Only the front end knows; any other request freed before its end lost its client."""
        tracked = self._tracked.get(request.request_id)
        if (
            tracked is not None
            and request.request_id in self._out_of_band
            and request.sampling_params.stop
            and tracked.sent < request.num_tokens - 1
            and request.num_output_tokens
        ):
            self.hold(store, tracked)

    @property
    def is_due(self) -> bool:
        """Whether :meth:`send` may have rows for the outputs of a step."""
        return bool(self._outgoing or self.riding)

    def send(self, store: PageStore, outputs: Mapping[int, Any]) -> None:
        """Put what is due into a step's outputs, by client."""
        for core_outputs in outputs.values():
            for output in core_outputs.outputs:
                request_id = output.request_id
                rows = self._outgoing.pop(request_id, None)
                if rows is None and request_id in self.riding and output.new_token_ids:
                    # Should the part fail, the earlier ones are void as well.
                    rows = void_array(self._layout)
                    with self._guard("sending rows along", (request_id,)):
                        rows = self.take(store, self._tracked[request_id])
                output.routed_experts = rows
        self._outgoing.clear()
        self._outgoing_nbytes = 0

    def withdraw(self, outputs: Mapping[int, Any]) -> None:
        """Take out again what :meth:`send` put in, after an error."""
        self._outgoing.clear()
        self._outgoing_nbytes = 0
        for core_outputs in outputs.values():
            for output in core_outputs.outputs:
                riding = output.request_id in self.riding
                output.routed_experts = void_array(self._layout) if riding else None

    def _put_off(self, store: PageStore, tracked: TrackedRequest) -> None:
        """Let the rows of a request that ends here be read by another thread."""
        request_id, stop = tracked.request.request_id, tracked.request.num_tokens - 1
        rows = store.freeze(request_id, tracked.sent, stop)
        tracked.sent = stop
        self._late.put_off(
            request_id,
            store,
            rows,
            lambda status: self._account(tracked, rows.start, status),
        )

    def _account(self, tracked: TrackedRequest, start: int, status: np.ndarray[Any, Any]) -> None:
        """Count the rows from position ``start`` that leave unrecorded."""
        if not status.any():
            return
        for value, number in enumerate(np.bincount(status).tolist()):
            if value != RowStatus.RECORDED and number:
                self._journal.count(metrics.ROWS_UNRECORDED + RowStatus(value).name, number)
        if not tracked.incomplete:
            tracked.incomplete = True
            self._journal.note(
                f"INCOMPLETE_{RowStatus(int(status[status != 0][0])).name}",
                f"of request {tracked.request.request_id} {why_incomplete(start, status)}",
            )
