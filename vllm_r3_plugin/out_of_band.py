"""The engine core's side of rows that are fetched: tickets, rows kept at the end, reading them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_r3_plugin.frozen_rows import FrozenRows
from vllm_r3_plugin.held_requests import HeldRequests, HeldRows
from vllm_r3_plugin.in_flight import ticket_array
from vllm_r3_plugin.page_store import PageStore
from vllm_r3_plugin.request_options import RequestOptions
from vllm_r3_plugin.row_reader import RowReader

_CHUNK_BYTES = 4 << 20
"""Rows that one answer of the engine core carries."""


@dataclass
class Ticketed:
    """A request under way whose rows will be fetched."""

    ticket: str
    request: Any
    options: RequestOptions


class OutOfBand:
    """Gives each request that asks for it a ticket, and rows to whoever shows it.

    The ticket travels with the first output of the request, since the front end may end the request
    by itself and cannot wait for an answer then.
    """

    def __init__(
        self, store: Callable[[], PageStore], held: HeldRequests, reader: RowReader
    ) -> None:
        self._store = store
        self._held = held
        self._reader = reader
        self._under_way: dict[str, Ticketed] = {}
        self._request_of_ticket: dict[str, str] = {}
        self._unannounced: set[str] = set()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._under_way

    def begin(self, request: Any, options: RequestOptions) -> None:
        """Give ``request`` a ticket."""
        ticketed = Ticketed(self._held.new_ticket(), request, options)
        self._under_way[request.request_id] = ticketed
        self._request_of_ticket[ticketed.ticket] = request.request_id
        self._unannounced.add(request.request_id)

    def announce(self, outputs: Mapping[int, Any]) -> None:
        """Send tickets along with the first outputs of their requests."""
        if not self._unannounced:
            return
        for core_outputs in outputs.values():
            for output in core_outputs.outputs:
                if output.request_id in self._unannounced:
                    self._unannounced.discard(output.request_id)
                    ticket = self._under_way[output.request_id].ticket
                    output.routed_experts = ticket_array(ticket, len(output.new_token_ids))

    def hold(self, request_id: str, stop: int) -> FrozenRows | None:
        """Keep the rows up to position ``stop``, in place of what was kept for this request."""
        ticketed = self._under_way[request_id]
        start = ticketed.options.start
        if stop < start:
            return None
        rows = self._store().freeze(request_id, start, stop)
        self._held.hold(ticketed.ticket, rows, ticketed.options)
        return rows

    def forget(self, request_id: str) -> None:
        """The request has been released; what is held stays."""
        ticketed = self._under_way.pop(request_id, None)
        if ticketed is not None:
            del self._request_of_ticket[ticketed.ticket]
            self._unannounced.discard(request_id)

    def read(self, ticket: str, stop: int | None, row: int | None) -> Future[dict[str, Any]] | str:
        """Some rows of ``ticket``, from position ``row`` or the first on, read in another thread.

        Args:
            ticket: from :meth:`announce`.
            stop: position after the last row of the whole, where the front end has ended the
                request; ``None`` means all that are held.
            row: position of the first row to read.

        Returns:
            a mapping that msgpack can carry, or the reason why there is none.

        """
        held = self._find(ticket, stop)
        if held is None:
            return self._held.why_not(ticket)
        store, stop = self._store(), held.rows.stop if stop is None else stop
        row = held.rows.start if row is None else row
        if not held.rows.start <= row <= stop <= held.rows.stop:
            return (
                f"it asks for rows {row} to {stop}, expected some of {held.rows.start} to "
                f"{held.rows.stop}: pass it as the response gave it."
            )
        return self._reader.submit(store, held.rows, lambda: self._read(store, held, row, stop))

    def _find(self, ticket: str, stop: int | None) -> HeldRows | None:
        held = self._held.find(ticket)
        request_id = self._request_of_ticket.get(ticket)
        if held is None and request_id is not None and stop is not None:
            # Of two processes that serve, one may fetch before the other's end of the request has
            # arrived here.
            request = self._under_way[request_id].request
            if stop <= request.num_tokens - 1:
                self.hold(request_id, stop)
                return self._held.find(ticket)
        return held

    @staticmethod
    def _read(store: PageStore, held: HeldRows, row: int, stop: int) -> dict[str, Any]:
        layout = store.layout
        last = min(stop, row + max(1, _CHUNK_BYTES // layout.row_nbytes))
        ids, status = store.read_frozen(held.rows, row, last)
        return {
            "start": held.rows.start,
            "stop": stop,
            "row": row,
            "ids": np.ascontiguousarray(ids).reshape(-1).view(np.uint8).data,
            "status": np.ascontiguousarray(status).data,
            "layout": layout.to_dict(),
            "encoding": held.options.encoding,
            "unrecorded": held.options.unrecorded,
        }
