"""What the store knows of each request under way, in arrays indexed by the request's slot."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vllm_r3_plugin.frozen_rows import NOWHERE, Rows

NEVER = np.iinfo(np.int64).max
"""A position, or page of a request, that none reaches."""


class _SlotOf(dict[str, int]):
    """Slot of each request; an unknown request has slot 0."""

    def __missing__(self, request_id: str) -> int:
        return 0


class RequestSlots:
    """Slots of requests; slot 0 belongs to none and takes no rows.

    Args:
        max_pages: pages of the longest sequence.

    Attributes:
        table: ``[slots, max_pages]`` page of the pool for each page of the request, or 0.
        floor: ``[slots]`` tokens before it hit the prefix cache.
        writable_from: ``[slots]`` rows from this position on may be written.
        published_from: ``[slots]`` the request's pages from this one on are published when full.
        keys: of each slot, the key of each full page of the request's tokens.
        blocks: of each slot, the KV block of each page.
        kept: of each slot, rows from position 0 that come before those of the pages.

    """

    def __init__(self, max_pages: int) -> None:
        slots = 64
        self.table = np.zeros((slots, max_pages), np.int32)
        self.floor = np.zeros(slots, np.int64)
        self.writable_from = np.zeros(slots, np.int64)
        self.writable_from[0] = NEVER
        self.published_from = np.zeros(slots, np.int64)
        self.keys: list[Sequence[Hashable]] = [()] * slots
        self.blocks: list[Sequence[Any]] = [()] * slots
        self.kept: list[Rows | None] = [None] * slots
        self._slot_of = _SlotOf()
        self._free: list[int] = list(range(slots - 1, 0, -1))
        self._last_batch: Sequence[str] = ()
        self._last_slots = np.zeros(0, np.int64)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slot_of

    def __getitem__(self, request_id: str) -> int:
        return self._slot_of[request_id]

    def of_batch(self, request_ids: Sequence[str]) -> Int[np.ndarray, " R"]:
        """Slot of each request."""
        # A decode batch is mostly that of the step before, and then often the same object.
        if request_ids is not self._last_batch and request_ids != self._last_batch:
            slots = map(self._slot_of.__getitem__, request_ids)
            self._last_slots = np.fromiter(slots, np.int64, len(request_ids))
            self._last_batch = request_ids
        return self._last_slots

    def begin(self, request_id: str) -> int:
        """The request's slot, a new one if it has none."""
        slot = self._slot_of[request_id]
        if slot:
            return slot
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slot_of[request_id] = slot
        self._last_batch = ()
        return slot

    def rename(self, request_id: str, name: str) -> None:
        """Let the request's slot, if it has one, be that of ``name``."""
        if request_id in self._slot_of:
            self._slot_of[name] = self._slot_of.pop(request_id)
            self._last_batch = ()

    def end(self, request_id: str) -> None:
        """Give a request's slot back, its part of the table empty."""
        slot = self._slot_of.pop(request_id)
        self._last_batch = ()
        self._clear(slot)
        self._free.append(slot)

    def repair(self, lost: Iterable[str]) -> None:
        """Forget requests, after an exception that may have left a change half done."""
        for request_id in lost:
            self._slot_of.pop(request_id, None)
        self._last_batch = ()
        unused = np.ones(len(self.floor), bool)
        unused[[0, *self._slot_of.values()]] = False
        self.table[unused] = NOWHERE
        self._free = np.flatnonzero(unused)[::-1].tolist()
        for slot in self._free:
            self._clear(slot)

    def _clear(self, slot: int) -> None:
        self.keys[slot], self.blocks[slot], self.kept[slot] = (), (), None

    def _grow(self) -> None:
        count = len(self.floor)
        # All of them or none: memory may be refused.
        doubled = {
            name: np.concatenate([old, np.zeros_like(old)])
            for name in ("table", "floor", "writable_from", "published_from")
            for old in [getattr(self, name)]
        }
        vars(self).update(doubled)
        self.keys += [()] * count
        self.blocks += [()] * count
        self.kept += [None] * count
        self._free.extend(range(2 * count - 1, count - 1, -1))
