"""Routing rows of the requests in flight, in pages owned by the request and indexed by position."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from shared_schema import RoutingLayout, RowStatus
from vllm_r3_plugin.frozen_rows import NOWHERE, FrozenRows, Rows
from vllm_r3_plugin.kv_blocks import TAKEN, BlocksOfPages
from vllm_r3_plugin.page_pool import PagePool
from vllm_r3_plugin.published_pages import FullPage
from vllm_r3_plugin.request_slots import NEVER, RequestSlots
from vllm_r3_plugin.step_rows import StepRows


class PendingHit(NamedTuple):
    """Rows of a prefix-cache hit that a step still in flight may publish."""

    request_id: str
    page_index: int
    key: Hashable
    block: int | None


class PageStore:
    """Pages of ``page_size`` rows; one pool ``[pages, page_size, L, k]`` in the narrow dtype.

    Pages, not KV slots: the engine gives a KV slot to another request while steps that wrote it
    are still on their way, and a request can finish without owning a single block. A row belongs
    to (request, position) for as long as the request lives.

    Full pages are published under the key of their tokens. A request admitted with a prefix-cache
    hit on the same KV block shares them, which pins them; pages that no request refers to are kept
    until :meth:`withdraw` names their block, or room is needed, least recently used first.

    Rows that are pinned stay after their request has ended, until they are unpinned. Their pages
    are kept in addition to ``cached_pages`` and ``max_pages``. One thread calls the store; any may
    call :meth:`read_frozen` for rows that are pinned.

    A request that is admitted again, after a preemption, keeps the rows of the tokens it has
    emitted; its tokens are fed again all the same, and those rows serve later hits.

    Args:
        layout: shape of a row.
        page_size: B, rows of a page: the tokens of a KV block hash.
        max_tokens: longest sequence.
        cached_pages: published pages at most, as long as requests do not refer to more.
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
        self.layout = layout
        self.page_size = page_size
        self.rows_written = 0
        self.rows_dropped = 0
        self._pool = PagePool(layout, page_size, cached_pages, max_pages)
        self._slots = RequestSlots(-(-max_tokens // page_size))
        self._kv_blocks = kv_blocks
        self._trusts_loads = True

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    @property
    def num_pages(self) -> int:
        """Pages that hold rows of a request or are kept for a prefix-cache hit."""
        return len(self._pool)

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
        former: str | None = None,
    ) -> list[PendingHit]:
        """Begin, or begin again, a request whose tokens from position ``start`` will be fed.

        Args:
            request_id: the request.
            start: tokens before it are not fed: they hit the prefix cache.
            keys: key of each full page of the request's tokens; may grow while the request runs.
            keep: rows below this position stay what they were at an earlier admission.
            num_loaded: tokens before ``start`` whose KV was loaded from outside of the engine.
            former: a request to be released later, to which all other rows of the earlier admission
                now belong: steps in flight may still complete pages for later hits.

        Returns:
            Hits whose rows are not there yet. Pass them to :meth:`resolve` each time that a step
            was written, until those of all steps scheduled so far have been.

        """
        kept = self.read(request_id, 0, keep) if keep else None
        slots = self._slots
        if former is not None:
            slots.rename(request_id, former)
        slot = slots.begin(request_id)
        slots.kept[slot] = kept
        self._truncate(slot, 0)
        slots.keys[slot] = keys
        blocks = slots.blocks[slot] = self._kv_blocks.of_request(request_id)
        slots.floor[slot] = slots.writable_from[slot] = start
        slots.published_from[slot] = -(-start // self.page_size)
        num_hits = min(-(-start // self.page_size), len(keys))
        first_loaded = -(-(start - num_loaded) // self.page_size)
        pending: list[PendingHit] = []
        elsewhere: list[PendingHit] = []
        for index in range(num_hits):
            loaded = index >= first_loaded
            block = None if loaded else self._kv_blocks.number(blocks, index)
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
        slots, slot = self._slots, self._slots[request_id]
        floor = int(slots.floor[slot])
        if not slot or start >= floor:
            return
        slots.floor[slot] = slots.writable_from[slot] = start
        if slots.published_from[slot] != NEVER:
            slots.published_from[slot] = -(-start // self.page_size)
        hits = slots.table[slot, start // self.page_size : -(-floor // self.page_size)]
        # Rows of a page that says "not computed here" are written in place, for all who hit it.
        others = np.flatnonzero((hits != NOWHERE) & ~self._pool.status[hits].any(1))
        self._pool.drop(hits[others])
        hits[others] = NOWHERE

    def resolve(self, pending: Iterable[PendingHit]) -> list[PendingHit]:
        """Give earlier hits the pages that have been published since; returns those without."""
        return [hit for hit in pending if not self._attach(hit)]

    def write(self, steps: Sequence[StepRows]) -> None:
        """Store the rows of consecutive steps; several at once cost little more than one.

        Rows of unknown requests, below a request's floor or at frozen positions go nowhere.
        """
        slots = np.concatenate([self._slots_of_rows(step) for step in steps])
        positions = np.concatenate([step.positions for step in steps])
        page_index = positions // self.page_size
        offsets = positions - page_index * self.page_size
        wanted = positions >= self._slots.writable_from[slots]
        pages = self._slots.table[slots, page_index]
        missing = (wanted > pages).nonzero()[0]  # wanted, and without a page
        if len(missing):
            pages[missing] = self._new_pages_at(slots[missing], page_index[missing])
        pages *= wanted
        # One index for ids and status costs half of what two cost for each.
        rows = np.multiply(pages, self.page_size, dtype=np.int64)
        rows += offsets
        start = 0
        for step in steps:
            stop = start + len(step.positions)
            if step.status == RowStatus.RECORDED:
                self.rows_written += int(np.count_nonzero(pages[start:stop]))
            self._pool.write(rows[start:stop], step.ids, step.status)
            start = stop
        last = (offsets == self.page_size - 1).nonzero()[0]
        if len(last):
            self._publish(slots[last], page_index[last])

    def settle(self, request_id: str, stop: int) -> None:
        """Forget rows from position ``stop`` on, and publish the full pages before it.

        Speculative decoding feeds draft tokens; the rows of rejected ones are not the request's.
        """
        slot = self._slots[request_id]
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
        writable_from, slot = self._slots.writable_from, self._slots[request_id]
        writable_from[slot] = max(writable_from[slot], stop)
        return self._rows_of(request_id, start, stop)

    def pin(self, rows: FrozenRows) -> None:
        """Keep the pages of ``rows``, until :meth:`unpin` has been called as often as this."""
        self._pool.pin(rows.pages[rows.pages != NOWHERE])

    def unpin(self, rows: FrozenRows) -> None:
        """Undo one :meth:`pin`."""
        self._pool.unpin(rows.pages[rows.pages != NOWHERE])

    def status_of(self, rows: FrozenRows) -> UInt8[np.ndarray, " T"]:
        """Status of each row, without a look at its ids."""
        return rows.read_status(rows.start, rows.stop, self._pool.status)

    def nbytes_of(self, rows: FrozenRows) -> int:
        """Bytes of the pages of ``rows``, and of what is kept beside them."""
        page = self.page_size * self.layout.row_nbytes
        kept = 0 if rows.kept is None else rows.kept[0].nbytes
        return len(rows.pages) * page + kept

    def read_frozen(self, rows: FrozenRows, start: int, stop: int) -> Rows:
        """Copies of the rows at positions ``start`` … ``stop - 1``, all of them among ``rows``."""
        return rows.read(start, stop, self._pool.ids, self._pool.status, self.layout)

    def release(self, request_id: str) -> None:
        """End a request; its published pages stay for later hits."""
        slot = self._slots[request_id]
        if slot:
            self._truncate(slot, 0)
            self._slots.end(request_id)

    def start_generation(self, *, loads_too: bool = True) -> None:
        """Give up all published pages: the KV cache was reset, for new weights say.

        Unless ``loads_too``, KV outside of the engine outlives the reset, and what is loaded from
        there has no rows here from now on.
        """
        self._trusts_loads = loads_too
        self._slots.published_from[:] = NEVER
        self._pool.withdraw_all()

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Give up the pages of KV blocks that no longer hold their tokens."""
        self._pool.withdraw(self._pool.published.take_blocks(blocks))

    def repair(self, lost: Iterable[str]) -> None:
        """Forget requests, after an exception that may have left work on them half done.

        What belongs to others is trusted: the pages in their tables, and the key of each published
        page. All the rest follows from these.
        """
        self._slots.repair(lost)
        self._pool.repair(self._slots.table)

    def _slots_of_rows(self, step: StepRows) -> Int[np.ndarray, " N"]:
        slots = self._slots.of_batch(step.request_ids)
        return slots if len(slots) == len(step.positions) else np.repeat(slots, step.num_tokens)

    def _rows_of(self, request_id: str, start: int, stop: int) -> FrozenRows:
        slots, slot, size = self._slots, self._slots[request_id], self.page_size
        pages = slots.table[slot, start // size : -(-stop // size)].copy()
        missing = RowStatus.STEP_LOST if slot else RowStatus.CAPTURE_FAILED
        return FrozenRows(start, stop, pages, int(slots.floor[slot]), slots.kept[slot], missing)

    def _new_pages_at(
        self, slots: Int[np.ndarray, " n"], page_index: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """Give requests the pages that n rows need; returns the page of each row."""
        table = self._slots.table
        places = slots * table.shape[1] + page_index
        different = np.sort(places)  # a tenth of np.unique's time
        is_first = np.empty(len(places), bool)
        is_first[0] = True
        np.not_equal(different[1:], different[:-1], out=is_first[1:])
        different = different[is_first]
        page_at = table.reshape(-1)
        page_at[different] = self._pool.new(len(different))
        pages: Int[np.ndarray, " n"] = page_at[places]
        self.rows_dropped += len(pages) - int(np.count_nonzero(pages))
        return pages

    def _attach(self, hit: PendingHit) -> bool:
        """Share a published page, or copy its rows below the floor; False if there is none."""
        pool, slots, slot = self._pool, self._slots, self._slots[hit.request_id]
        source = pool.published.find_for_hit(hit.key, hit.block)
        if source == NOWHERE or not slot:
            return False
        num_rows = int(slots.floor[slot]) - hit.page_index * self.page_size
        if num_rows <= 0:  # admitted again since, without this hit
            return True
        if num_rows >= self.page_size:
            pool.share(source)
            slots.table[slot, hit.page_index] = source
            return True
        if source in pool.published.unreferenced:
            # The page that it is copied to shall be another.
            pool.published.unreferenced.move_to_end(source)
        page = int(slots.table[slot, hit.page_index]) or int(pool.new(1)[0])
        slots.table[slot, hit.page_index] = page
        pool.copy_rows(source, page, num_rows)
        return True

    def _mark_not_computed(self, slot: int, hit: PendingHit) -> None:
        """Say of a hit's rows that they are not here, also to later hits on its KV block."""
        page = int(self._pool.new(1)[0])
        if page == NOWHERE:
            return
        num_rows = int(self._slots.floor[slot]) - hit.page_index * self.page_size
        self._slots.table[slot, hit.page_index] = page
        self._pool.status[page, :num_rows] = RowStatus.NOT_COMPUTED_HERE
        if num_rows >= self.page_size:
            self._pool.published.add([(page, hit.key, None)])

    def _publish(self, slots: Int[np.ndarray, " n"], page_index: Int[np.ndarray, " n"]) -> None:
        """Publish pages that their request fed completely since the last reset."""
        pages = self._slots.table[slots, page_index]
        full = self._pool.are_recorded(pages) & (page_index >= self._slots.published_from[slots])
        keys_of, blocks_of, number = self._slots.keys, self._slots.blocks, self._kv_blocks.number
        found: list[FullPage] = []
        for slot, index, page in zip(
            slots[full].tolist(), page_index[full].tolist(), pages[full].tolist(), strict=True
        ):
            keys = keys_of[slot]
            if index < len(keys):
                block = number(blocks_of[slot], index)
                if block != TAKEN:
                    found.append((page, keys[index], block))
        for another in self._pool.published.add(found):
            self._publish_again(another)

    def _publish_again(self, full: FullPage) -> None:
        """Let a page stand for its key in place of another, if hits use its KV block."""
        _, key, block = full
        published = self._pool.published
        if block is not None and self._kv_blocks.used_by_hits(key) not in (None, block):
            return
        older = published.find(key)
        if not published.has_block(older):
            self._pool.withdraw([older])
        published.let_stand(full)

    def _truncate(self, slot: int, stop: int) -> None:
        """Forget rows from position ``stop`` on."""
        index, offset = divmod(stop, self.page_size)
        row = self._slots.table[slot]
        if offset:
            page = int(row[index])
            if page not in self._pool.published:
                self._pool.status[page, offset:] = RowStatus.STEP_LOST
            index += 1
        # The last page first: a hit needs all that come before.
        columns = (index + np.flatnonzero(row[index:]))[::-1]
        self._pool.drop(row[columns])
        row[columns] = NOWHERE
