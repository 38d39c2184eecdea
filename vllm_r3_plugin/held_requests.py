"""Rows of ended requests that wait to be fetched, under tickets that cannot be guessed."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from vllm_r3_plugin.frozen_rows import FrozenRows
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.page_store import PageStore
from vllm_r3_plugin.request_options import RequestOptions

_REMEMBERED = 1024
"""Tickets whose rows are gone for which the reason is still told."""


class HeldRows(NamedTuple):
    """What lies under one ticket; ``expires`` is a time of the clock, ``nbytes`` what it counts."""

    rows: FrozenRows
    options: RequestOptions
    nbytes: int
    expires: float


class HeldRequests:
    """Pins rows until they are too old, or too many.

    Fetching takes nothing away, so that a client may repeat it. Beyond ``max_bytes`` the oldest are
    given up: their clients have had the longest time.

    Args:
        store: where the rows are.
        engine_index: which engine core this is, of those that share a server.
        max_bytes: whole pages of all rows held, in bytes; one that two of them share counts twice.
        ttl_s: seconds for which rows are held.
        journal: counts rows given up before their time.
        clock: seconds, never going back.

    """

    def __init__(
        self,
        store: PageStore,
        engine_index: int,
        max_bytes: int,
        ttl_s: float,
        journal: Journal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_bytes = 0
        self._store = store
        self._engine_index = engine_index
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._journal = journal
        self._clock = clock
        self._held: OrderedDict[str, HeldRows] = OrderedDict()
        self._gone: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def new_ticket(self) -> str:
        """A ticket for one request: the engine's index and 192 random bits."""
        return f"{self._engine_index}.{secrets.token_urlsafe(24)}"

    def hold(self, ticket: str, rows: FrozenRows, options: RequestOptions) -> None:
        """Keep ``rows`` under ``ticket``, in place of what lies there; or note why not."""
        self._give_up(ticket)
        self.release_expired()
        nbytes = self._store.nbytes_of(rows)
        if nbytes > self._max_bytes:
            self._remember(ticket, self._too_large(nbytes))
            self._journal.note(
                "FETCH_REFUSED",
                f"rows of a request cannot be fetched, {self._too_large(nbytes)}",
            )
            return
        while self.num_bytes + nbytes > self._max_bytes:
            self._evict_oldest()
        self._store.pin(rows)
        self.num_bytes += nbytes
        self._held[ticket] = HeldRows(rows, options, nbytes, self._clock() + self._ttl_s)

    def find(self, ticket: str) -> HeldRows | None:
        """What lies under ``ticket``."""
        self.release_expired()
        return self._held.get(ticket)

    def why_not(self, ticket: str) -> str:
        """Why nothing lies under ``ticket``, and what helps; the second half of a sentence."""
        return self._gone.get(
            ticket,
            "expected one of a request that has ended: take it from the end of the response, and "
            "ask the server that gave it.",
        )

    def release_expired(self) -> None:
        """Give up what is too old; cheap where nothing is."""
        while self._held:
            ticket, held = next(iter(self._held.items()))
            if held.expires > self._clock():
                return
            self._give_up(ticket)
            self._remember(
                ticket,
                f"they were kept for {self._ttl_s:g} s: fetch them sooner or raise "
                'fetch_ttl_s in additional_config["r3"].',
            )

    def start_over(self, store: PageStore) -> None:
        """Another store has taken the place of that where the rows were."""
        for ticket in self._held:
            self._remember(ticket, "they were lost after an error: see the server's log.")
        self._held.clear()
        self.num_bytes = 0
        self._store = store

    def _evict_oldest(self) -> None:
        ticket = next(iter(self._held))
        self._give_up(ticket)
        reason = (
            f"they were given up for newer ones at {self._max_bytes} bytes: fetch them sooner or "
            'raise fetch_max_bytes in additional_config["r3"].'
        )
        self._remember(ticket, reason)
        self._journal.note("FETCH_EVICTED", f"rows of a request can no longer be fetched, {reason}")

    def _too_large(self, nbytes: int) -> str:
        return (
            f"they take {nbytes} bytes, expected at most {self._max_bytes}: raise fetch_max_bytes "
            'in additional_config["r3"].'
        )

    def _give_up(self, ticket: str) -> None:
        held = self._held.pop(ticket, None)
        if held is not None:
            self.num_bytes -= held.nbytes
            self._store.unpin(held.rows)

    def _remember(self, ticket: str, reason: str) -> None:
        self._gone[ticket] = reason
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
