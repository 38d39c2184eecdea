"""Which KV block holds the KV of a page of rows, and which one a prefix-cache hit will use."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

TAKEN = -1
"""In place of a block's number: it was allocated anew more than once, its KV is long gone."""


class BlocksOfPages(Protocol):
    """Tells apart computations of the same tokens: each fills a KV block of its own.

    Two requests may compute the same tokens, under new weights with other experts. Their blocks
    have the same hash, so rows must say to which of them they belong. A block has another number
    each time that it is allocated. None is a block that is not known; rows behind it are found by
    their hash alone.
    """

    def of_request(self, request_id: str) -> Any:
        """The block of each page that the request has now, and of those that it will add."""

    def number(self, blocks: Any, page_index: int) -> int | None:
        """One of the blocks of :meth:`of_request`, or ``TAKEN``."""

    def used_by_hits(self, key: Hashable) -> int | None:
        """The KV block in which a request with this block hash finds its tokens now."""


@dataclass(slots=True)
class BlocksOfRequest:
    """VLLM's own list of a request's blocks, which grows with the request.

    Attributes:
        blocks: the list; vLLM begins another when it has taken the blocks away.
        lost_at: the last number that was given out when it took them away.

    """

    blocks: Sequence[Any]
    lost_at: int = sys.maxsize


class KVBlocks:
    """KV blocks of the group that has one for every token, if the model has such a group.

    Other groups hold a sliding window or a state; most of their blocks are null, hence not known.
    No block is known where one holds several pages, for then a hit on some of them copies it.

    Args:
        kv_cache_manager: vLLM's.
        page_size: tokens of a page and of a KV block hash.
        guard: entered while blocks are numbered, in the middle of vLLM's allocation.

    Attributes:
        are_kept: whether a request keeps its blocks until it loses all of them.

    """

    def __init__(
        self, kv_cache_manager: Any, page_size: int, guard: AbstractContextManager[Any]
    ) -> None:
        from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

        managers = kv_cache_manager.coordinator.single_type_managers
        whole = [i for i, m in enumerate(managers) if isinstance(m, FullAttentionManager)]
        self.are_kept = bool(whole)
        self._group = whole[0] if whole else 0
        self._are_pages = managers[self._group].block_size == page_size
        self._blocks_of = managers[self._group].req_to_blocks
        pool = kv_cache_manager.block_pool
        self._cached_block = pool.get_cached_block
        self._number_of = list(range(len(pool.blocks)))
        self._number_before = list(self._number_of)
        self._last_number = len(pool.blocks)
        self._replaced: list[int] = []
        self._of_request: dict[str, BlocksOfRequest] = {}
        self._watch_allocations(pool, guard)

    def of_request(self, request_id: str) -> BlocksOfRequest:
        """Its blocks until :meth:`lose`."""
        found = BlocksOfRequest(self._blocks_of.get(request_id, ()) if self._are_pages else ())
        self._of_request[request_id] = found
        return found

    def lose(self, request_id: str) -> None:
        """Note that a request is about to lose its blocks; steps in flight may have filled them."""
        found = self._of_request.pop(request_id, None)
        if found is not None:
            found.lost_at = self._last_number

    def number(self, blocks: BlocksOfRequest, page_index: int) -> int | None:
        """The block's number, if there is a block and it is not null."""
        if page_index >= len(blocks.blocks) or blocks.blocks[page_index].is_null:
            return None
        block_id: int = blocks.blocks[page_index].block_id
        number = self._number_of[block_id]
        if number > blocks.lost_at:
            number = self._number_before[block_id]
            if number > blocks.lost_at:
                return TAKEN
            # Hits of others that have lost it too may wait for its rows, which go after that.
            self._replaced.append(number)
        return number

    def used_by_hits(self, key: Hashable) -> int | None:
        """Of several cached blocks with one hash, vLLM uses the first."""
        cached = self._cached_block(key, [self._group])
        return None if cached is None else self._number_of[cached[0].block_id]

    def take_replaced(self) -> list[int]:
        """Numbers of blocks that were allocated anew, and whose rows may have come since."""
        replaced, self._replaced = self._replaced, []
        return replaced

    def _watch_allocations(self, pool: Any, guard: AbstractContextManager[Any]) -> None:
        allocate = pool.get_new_blocks

        def watch(*args: Any, **kwargs: Any) -> Any:
            blocks = allocate(*args, **kwargs)
            with guard:
                self._renumber(blocks)
            return blocks

        pool.get_new_blocks = watch

    def _renumber(self, blocks: Iterable[Any]) -> None:
        for block in blocks:
            self._number_before[block.block_id] = self._number_of[block.block_id]
            self._replaced.append(self._number_of[block.block_id])
            self._last_number += 1
            self._number_of[block.block_id] = self._last_number
