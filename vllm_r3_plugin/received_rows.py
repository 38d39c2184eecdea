"""What one completion got from the engine core, and the form in which its user asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shared_schema import RoutedExperts, RoutingLayout, RowStatus, encode, to_vllm_native
from vllm_r3_plugin.fetch_path import Ticket, VersionedRows, spans_of
from vllm_r3_plugin.frozen_rows import Rows
from vllm_r3_plugin.in_flight import is_void, rows_of, ticket_of
from vllm_r3_plugin.request_options import RequestOptions


class Delivery(NamedTuple):
    """What stands at a completion: rows, or a path to fetch them from, or why there are none."""

    routed_experts: np.ndarray[Any, Any] | bytes | None = None
    path: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class ReceivedRows:
    """Rows on their way to the user.

    Attributes:
        array: what :mod:`vllm_r3_plugin.in_flight` describes; None where nothing arrived.
        options: what the request asked for.
        stop: position after the last row that belongs to the tokens returned. Rows beyond it are
            cut off, lacking ones are unrecorded.
        weight_versions: as far as vLLM knows them, in the order of the rows.

    """

    array: np.ndarray[Any, Any] | None
    options: RequestOptions
    stop: int
    weight_versions: Sequence[VersionedRows] = ()

    @property
    def nbytes(self) -> int:
        """Size of the array."""
        return 0 if self.array is None else self.array.nbytes

    def deliver(self, layout: RoutingLayout) -> Delivery:
        """Bring them into the form that was asked for."""
        ticket = None if self.array is None else ticket_of(self.array)
        if ticket is not None:
            return Delivery(path=Ticket(ticket, self.stop, tuple(self.weight_versions)).path)
        ids, status = self._rows(layout)
        start = self.options.start
        spans = tuple(spans_of(self.weight_versions, start, start + len(status)))
        routed = RoutedExperts.trusted(ids, layout, start, status, spans)
        if self.options.encoding == "r3":
            return Delivery(encode(routed))
        sentinel = self.options.unrecorded == "sentinel"
        if sentinel or routed.is_complete:
            return Delivery(to_vllm_native(routed, sentinel=sentinel))
        return Delivery(reason=why_incomplete(start, status))

    def _rows(self, layout: RoutingLayout) -> Rows:
        if self.array is None or is_void(self.array):
            ids = np.empty((0, layout.num_moe_layers, layout.top_k), layout.dtype)
            status = np.empty(0, np.uint8)
        else:
            ids, status = rows_of(self.array, layout)
        num_rows = max(0, self.stop - self.options.start)
        lacking = max(0, num_rows - len(status))
        if lacking:
            fill = np.full((lacking, *ids.shape[1:]), layout.fill_id, layout.dtype)
            ids = np.concatenate([ids, fill])
            status = np.append(status, np.full(lacking, RowStatus.MISSING, np.uint8))
        return ids[:num_rows], status[:num_rows]


def why_incomplete(start: int, status: np.ndarray[Any, Any]) -> str:
    """One sentence about the rows from position ``start`` that are unrecorded."""
    unrecorded = np.flatnonzero(status)
    first = int(unrecorded[0])
    return (
        f"{len(unrecorded)} of {len(status)} rows are unrecorded, the first at position "
        f"{start + first} ({RowStatus(int(status[first])).name})."
    )
