"""Routing rows of the requests in flight, in pages owned by the request and indexed by position."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer, UInt8

from shared_schema import RoutingLayout, RowStatus
from vllm_r3_plugin.frozen_rows import NOWHERE, FrozenRows, Rows
from vllm_r3_plugin.kv_blocks import BlocksOfPages
from vllm_r3_plugin.published_pages import PublishedPages


class PendingHit(NamedTuple):
    """Rows of a prefix-cache hit that a step still in flight may publish."""

    request_id: str
    page_index: int
    key: Hashable
    block: int | None


class _SlotOf(dict[str, int]):
    """Slot of each request; an unknown request has slot 0."""

    def __missing__(self, request_id: str) -> int:
        return 0


class PageStore:
    """Pages of ``page_size`` rows; one pool ``[pages, page_size, L, k]`` in the narrow dtype.

    Pages, not KV slots: the engine gives a KV slot to another request while steps that wrote it
    are still on their way, and a request can finish without owning a single block. A row belongs
    to (request, position) for as long as the request lives.

    Full pages are published under the key of their tokens. A request admitted with a prefix-cache
    hit on the same KV block shares them, which pins them; pages that no request refers to are kept
    until room is needed, least recently used first.

    Rows that are pinned stay after their request has ended, until they are unpinned. Their pages
    are kept in addition to ``cached_pages`` and ``max_pages``. One thread calls the store; any may
    call :meth:`read_frozen` for rows that are pinned.

    A request that is admitted again, after a preemption, keeps the rows of the tokens it has
    emitted; its tokens are fed again all the same, and those rows serve later hits.

    Args:
        layout: shape of a row.
        page_size: B, rows of a page: the tokens of a KV block hash.
        max_tokens: longest sequence.
        cached_pages: pages kept in all before unreferenced ones are given up.
        max_pages: pages at most. Beyond it new rows are dropped and read back as unrecorded.
        kv_blocks: which KV block a page belongs to.

    """

    def __init__(
        self,
        layout: RoutingLayout,
        page_size: int,
        max_tokens: int,
        cached_pages: int,
        max_pages: int,
        kv_blocks: BlocksOfPages,
    ) -> None:
        self._kv_blocks = kv_blocks
        self.layout = layout
        self.page_size = page_size
        self.rows_written = 0
        self.rows_dropped = 0
        self._soft_limit = max(1, min(cached_pages, max_pages))
        self._max_pages = max(1, max_pages)
        pages = 1 + self._soft_limit
        row = (layout.num_moe_layers, layout.top_k)
        self._pool = np.empty((pages, page_size, *row), layout.dtype)
        self._status = np.empty((pages, page_size), np.uint8)
        self._references = np.zeros(pages, np.int32)
        self._pins = np.zeros(pages, np.int32)
        self._num_pinned_pages = 0
        self._free_pages: list[int] = []
        self._next_page = 1
        self._published = PublishedPages()
        self._generation = 0
        self._trusts_loads = True

        slots, width = 64, -(-max_tokens // page_size)
        self._slot_of = _SlotOf()
        self._free_slots: list[int] = list(range(slots - 1, 0, -1))
        self._last_batch: Sequence[str] = ()
        self._last_slots = np.zeros(0, np.int64)
        self._table = np.zeros((slots, width), np.int32)
        self._floor = np.zeros(slots, np.int64)
        self._writable_from = np.zeros(slots, np.int64)
        self._writable_from[0] = np.iinfo(np.int64).max
        self._request_of = [""] * slots
        self._keys: list[Sequence[Hashable]] = [()] * slots
        self._first_own_page = [0] * slots
        self._slot_generation = [0] * slots
        self._kept: list[Rows | None] = [None] * slots

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slot_of

    @property
    def num_pages(self) -> int:
        """Pages that hold rows of a request or are kept for a prefix-cache hit."""
        return self._next_page - 1 - len(self._free_pages)

    @property
    def nbytes(self) -> int:
        """Host memory that those pages take, in bytes."""
        return self.num_pages * self.page_size * self.layout.row_nbytes

    def admit(
        self,
        request_id: str,
        start: int,
        keys: Sequence[Hashable],
        keep: int = 0,
        num_loaded: int = 0,
    ) -> list[PendingHit]:
        """Begin, or begin again, a request whose tokens from position ``start`` will be fed.

        Args:
            request_id: the request.
            start: tokens before it are not fed: they hit the prefix cache.
            keys: key of each full page of the request's tokens; may grow while the request runs.
            keep: rows below this position stay what they were at an earlier admission.
            num_loaded: tokens before ``start`` whose KV was loaded from outside of the engine.

        Returns:
            Hits whose rows are not there yet. Pass them to :meth:`resolve` once the rows of all
            steps scheduled so far have been written.

        """
        kept = self.read(request_id, 0, keep) if keep else None
        slot = self._slot_of[request_id] or self._new_slot(request_id)
        self._kept[slot] = kept
        self._truncate(slot, 0)
        self._keys[slot] = keys
        self._slot_generation[slot] = self._generation
        self._floor[slot] = self._writable_from[slot] = start
        self._first_own_page[slot] = -(-start // self.page_size)
        num_hits = min(-(-start // self.page_size), len(keys))
        first_loaded = -(-(start - num_loaded) // self.page_size)
        pending: list[PendingHit] = []
        elsewhere: list[PendingHit] = []
        for index in range(num_hits):
            loaded = index >= first_loaded
            block = None if loaded else self._kv_blocks.of(request_id, index)
            hit = PendingHit(request_id, index, keys[index], block)
            if loaded and not self._trusts_loads:
                elsewhere.append(hit)
            elif not self._attach(hit):
                (elsewhere if loaded else pending).append(hit)
        for hit in elsewhere:
            self._mark_not_computed(slot, hit)
        return pending

    def rewind(self, request_id: str, start: int) -> None:
        """Take rows anew from position ``start`` on: the KV of a hit could not be loaded."""
        slot = self._slot_of[request_id]
        floor = int(self._floor[slot])
        if not slot or start >= floor:
            return
        self._floor[slot] = self._writable_from[slot] = start
        self._first_own_page[slot] = -(-start // self.page_size)
        hits = self._table[slot, start // self.page_size : -(-floor // self.page_size)]
        # Rows of a page that says "not computed here" are written in place, for all who hit it.
        others = np.flatnonzero((hits != NOWHERE) & ~self._status[hits].any(1))
        self._drop_references(hits[others])
        hits[others] = NOWHERE

    def resolve(self, pending: Iterable[PendingHit]) -> None:
        """Give earlier hits the pages that have been published since."""
        for hit in pending:
            self._attach(hit)

    def write(
        self,
        request_ids: Sequence[str],
        num_tokens: Int[np.ndarray, " R"],
        positions: Int[np.ndarray, " N"],
        ids: Integer[np.ndarray, "N L k"],
        status: RowStatus = RowStatus.RECORDED,
    ) -> None:
        """Store one step: ``num_tokens[i]`` rows of ``request_ids[i]`` at ``positions``.

        Rows of unknown requests, below a request's floor or at frozen positions go nowhere.
        """
        slots = self._slots_of(request_ids)
        if len(positions) != len(slots):
            slots = np.repeat(slots, num_tokens)
        page_index = positions // self.page_size
        offset = positions - page_index * self.page_size
        wanted = positions >= self._writable_from[slots]
        pages = self._table[slots, page_index]
        missing = (wanted > pages).nonzero()[0]  # wanted, and without a page
        if len(missing):
            pages[missing] = self._new_pages_at(slots[missing], page_index[missing])
        pages *= wanted
        self.rows_written += int(np.count_nonzero(pages))
        self._pool[pages, offset] = ids
        self._status[pages, offset] = status
        last = (offset == self.page_size - 1).nonzero()[0]
        if len(last):
            self._publish(slots[last], page_index[last])

    def settle(self, request_id: str, stop: int) -> None:
        """Forget rows from position ``stop`` on, and publish the full pages before it.

        Speculative decoding feeds draft tokens; the rows of rejected ones are not the request's.
        """
        slot = self._slot_of[request_id]
        if not slot:
            return
        self._truncate(slot, stop)
        full = stop // self.page_size
        recent = np.arange(max(0, full - 2), full)
        self._publish(np.full(len(recent), slot), recent)

    def read(self, request_id: str, start: int, stop: int) -> Rows:
        """Copies of the rows at positions ``start`` … ``stop - 1``: ids, and status of each row.

        Rows of an unknown request, such as one given up after an error, are ``CAPTURE_FAILED``.
        """
        return self.read_frozen(self._rows_of(request_id, start, stop), start, stop)

    def freeze(self, request_id: str, start: int, stop: int) -> FrozenRows:
        """Let no later step change the rows at positions ``start`` … ``stop - 1``."""
        slot = self._slot_of[request_id]
        self._writable_from[slot] = max(self._writable_from[slot], stop)
        return self._rows_of(request_id, start, stop)

    def pin(self, rows: FrozenRows) -> None:
        """Keep the pages of ``rows``, until :meth:`unpin` has been called as often as this."""
        pages = rows.pages[rows.pages != NOWHERE]
        self._references[pages] += 1
        self._pins[pages] += 1
        self._num_pinned_pages += len(pages)

    def unpin(self, rows: FrozenRows) -> None:
        """Undo one :meth:`pin`."""
        pages = rows.pages[rows.pages != NOWHERE]
        self._pins[pages] -= 1
        self._num_pinned_pages -= len(pages)
        self._drop_references(pages)

    def status_of(self, rows: FrozenRows) -> UInt8[np.ndarray, " T"]:
        """Status of each row, without a look at its ids."""
        return rows.read_status(rows.start, rows.stop, self._status)

    def nbytes_of(self, rows: FrozenRows) -> int:
        """Bytes of the pages of ``rows``, and of what is kept beside them."""
        page = self.page_size * self.layout.row_nbytes
        kept = 0 if rows.kept is None else rows.kept[0].nbytes
        return len(rows.pages) * page + kept

    def read_frozen(self, rows: FrozenRows, start: int, stop: int) -> Rows:
        """Copies of the rows at positions ``start`` … ``stop - 1``, all of them among ``rows``."""
        return rows.read(start, stop, self._pool, self._status, self.layout)

    def release(self, request_id: str) -> None:
        """End a request; its published pages stay for later hits."""
        slot = self._slot_of.pop(request_id, 0)
        if slot:
            self._last_batch = ()
            self._truncate(slot, 0)
            self._keys[slot] = ()
            self._kept[slot] = None
            self._free_slots.append(slot)

    def start_generation(self, *, loads_too: bool = True) -> None:
        """Give up all published pages: the KV cache was reset, for new weights say.

        Unless ``loads_too``, KV outside of the engine outlives the reset, and what is loaded from
        there has no rows here from now on.
        """
        self._generation += 1
        self._trusts_loads = loads_too
        self._free_pages.extend(self._published.unreferenced)
        self._published.clear()

    def repair(self, lost: Iterable[str]) -> None:
        """Forget requests, after an exception that may have left work on them half done.

        What belongs to others is trusted: the pages in their tables, and the key of each published
        page. All the rest follows from these.
        """
        for request_id in lost:
            self._slot_of.pop(request_id, None)
        self._last_batch = ()
        unused = np.ones(len(self._floor), bool)
        unused[[0, *self._slot_of.values()]] = False
        self._table[unused] = NOWHERE
        self._free_slots = np.flatnonzero(unused)[::-1].tolist()
        for slot in self._free_slots:
            self._keys[slot], self._kept[slot] = (), None
        self._references[:] = np.bincount(self._table.ravel(), minlength=len(self._references))
        self._references += self._pins
        self._references[NOWHERE] = 0
        pages = np.flatnonzero(self._references[: self._next_page] == 0)[1:].tolist()
        self._published.repair(pages)
        self._free_pages = [page for page in pages if page not in self._published]

    def _rows_of(self, request_id: str, start: int, stop: int) -> FrozenRows:
        slot, size = self._slot_of[request_id], self.page_size
        pages = self._table[slot, start // size : -(-stop // size)].copy()
        missing = RowStatus.STEP_LOST if slot else RowStatus.CAPTURE_FAILED
        return FrozenRows(start, stop, pages, int(self._floor[slot]), self._kept[slot], missing)

    def _new_slot(self, request_id: str) -> int:
        if not self._free_slots:
            count = len(self._floor)
            # All of them or none: memory may be refused.
            doubled = {
                name: np.concatenate([old, np.zeros_like(old)])
                for name in ("_table", "_floor", "_writable_from")
                for old in [getattr(self, name)]
            }
            vars(self).update(doubled)
            self._request_of += [""] * count
            self._first_own_page += [0] * count
            self._slot_generation += [0] * count
            self._keys += [()] * count
            self._kept += [None] * count
            self._free_slots.extend(range(2 * count - 1, count - 1, -1))
        slot = self._free_slots.pop()
        self._slot_of[request_id] = slot
        self._request_of[slot] = request_id
        self._last_batch = ()
        return slot

    def _slots_of(self, request_ids: Sequence[str]) -> Int[np.ndarray, " R"]:
        # A decode batch is mostly that of the step before, and then often the same object.
        if request_ids is not self._last_batch and request_ids != self._last_batch:
            slots = map(self._slot_of.__getitem__, request_ids)
            self._last_slots = np.fromiter(slots, np.int64, len(request_ids))
            self._last_batch = request_ids
        return self._last_slots

    def _new_pages_at(
        self, slots: Int[np.ndarray, " n"], page_index: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """Give requests the pages that n rows need; returns the page of each row."""
        places = slots * self._table.shape[1] + page_index
        is_first = np.empty(len(places), bool)  # rows of one page follow each other
        is_first[0] = True
        np.not_equal(places[1:], places[:-1], out=is_first[1:])
        first_places = places[is_first]
        table = self._table.reshape(-1)
        table[first_places] = self._new_pages(len(first_places))
        pages: Int[np.ndarray, " n"] = table[places]
        if self._next_page > self._max_pages + self._num_pinned_pages:
            self.rows_dropped += int(np.count_nonzero(pages == NOWHERE))
        return pages

    def _new_pages(self, count: int) -> Int[np.ndarray, " count"]:
        """Pages whose rows read as lost, each referenced once; 0 for those without room."""
        from_free = max(0, len(self._free_pages) - count)
        found = self._free_pages[from_free:]
        del self._free_pages[from_free:]
        unused = min(count - len(found), max(0, self._soft_limit + 1 - self._next_page))
        found += range(self._next_page, self._next_page + unused)
        self._next_page += unused
        while len(found) < count:
            found.append(self._find_page())
        pages = np.array(found, np.int64)
        self._status[pages] = RowStatus.STEP_LOST
        self._references[pages] = 1
        return pages

    def _find_page(self) -> int:
        """A page beyond those kept for hits, the least recently used of which is given up, or 0."""
        unreferenced = self._published.unreferenced
        if unreferenced and self._next_page > self._soft_limit + self._num_pinned_pages:
            page = next(iter(unreferenced))
            self._published.remove(page)
            return page
        if self._next_page > self._max_pages + self._num_pinned_pages:
            return NOWHERE
        page = self._next_page
        if page == len(self._pool):
            try:
                self._grow()
            except MemoryError:
                self._max_pages = page - 1
                return NOWHERE
        self._next_page += 1
        return page

    def _grow(self) -> None:
        pages = min(2 * len(self._pool), 1 + self._max_pages + self._num_pinned_pages)
        # All of them or none: memory may be refused.
        grown = {}
        for name in ("_pool", "_status", "_references", "_pins"):
            old = getattr(self, name)
            grown[name] = np.zeros((pages, *old.shape[1:]), old.dtype)
            grown[name][: len(old)] = old
        vars(self).update(grown)

    def _attach(self, hit: PendingHit) -> bool:
        """Share a published page, or copy its rows below the floor; False if there is none."""
        slot = self._slot_of[hit.request_id]
        source = self._published.find_for_hit(hit.key, hit.block)
        if source == NOWHERE or not slot:
            return False
        num_rows = int(self._floor[slot]) - hit.page_index * self.page_size
        if num_rows <= 0:  # admitted again since, without this hit
            return True
        if num_rows >= self.page_size:
            self._references[source] += 1
            self._published.unreferenced.pop(source, None)
            self._table[slot, hit.page_index] = source
            return True
        if source in self._published.unreferenced:
            # The page that it is copied to shall be another.
            self._published.unreferenced.move_to_end(source)
        page = int(self._table[slot, hit.page_index]) or int(self._new_pages(1)[0])
        self._table[slot, hit.page_index] = page
        self._pool[page, :num_rows] = self._pool[source, :num_rows]
        self._status[page, :num_rows] = self._status[source, :num_rows]
        return True

    def _mark_not_computed(self, slot: int, hit: PendingHit) -> None:
        """Say of a hit's rows that they are not here, also to later hits on its KV block."""
        page = int(self._new_pages(1)[0])
        if page == NOWHERE:
            return
        num_rows = int(self._floor[slot]) - hit.page_index * self.page_size
        self._table[slot, hit.page_index] = page
        self._status[page, :num_rows] = RowStatus.NOT_COMPUTED_HERE
        if num_rows >= self.page_size and self._published.find(hit.key) == NOWHERE:
            self._published.add(page, hit.key, None)

    def _publish(self, slots: Int[np.ndarray, " n"], page_index: Int[np.ndarray, " n"]) -> None:
        """Publish pages that their request fed completely in the current generation."""
        pages = self._table[slots, page_index]
        worst = np.maximum.reduce(self._status[pages], 1)
        for slot, index, page, worst_status in zip(
            slots.tolist(), page_index.tolist(), pages.tolist(), worst.tolist(), strict=True
        ):
            if (
                page == NOWHERE
                or worst_status != RowStatus.RECORDED
                or index < self._first_own_page[slot]
                or self._slot_generation[slot] != self._generation
            ):
                continue
            keys = self._keys[slot]
            if index >= len(keys) or page in self._published:
                continue
            key = keys[index]
            block = self._kv_blocks.of(self._request_of[slot], index)
            older = self._published.find(key)
            if older != NOWHERE:
                if block is not None and self._kv_blocks.used_by_hits(key) not in (None, block):
                    continue
                if self._published.remove(older):
                    self._free_pages.append(older)
            self._published.add(page, key, block)

    def _truncate(self, slot: int, stop: int) -> None:
        """Forget rows from position ``stop`` on."""
        index, offset = divmod(stop, self.page_size)
        row = self._table[slot]
        if offset:
            page = int(row[index])
            if page not in self._published:
                self._status[page, offset:] = RowStatus.STEP_LOST
            index += 1
        columns = index + np.flatnonzero(row[index:])
        self._drop_references(row[columns])
        row[columns] = NOWHERE

    def _drop_references(self, pages: Int[np.ndarray, " n"]) -> None:
        """Take one reference from each of ``pages``, all of them different."""
        self._references[pages] -= 1
        for page in pages[self._references[pages] == 0].tolist():
            if page in self._published:
                self._published.unreferenced[page] = None
            else:
                self._free_pages.append(page)
