"""Which KV block holds the KV of a page of rows, and which one a prefix-cache hit will use."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol


class BlocksOfPages(Protocol):
    """Tells apart computations of the same tokens: each fills a KV block of its own.

    Two requests may compute the same tokens, under new weights with other experts. Their blocks
    have the same hash, so rows must say to which of them they belong. None is a block that is not
    known; rows behind it are found by their hash alone.
    """

    def of_request(self, request_id: str) -> Sequence[Any]:
        """The block of each page that the request has now.

        It grows with the request, and stays as it is when the request loses its blocks.
        """

    def number(self, blocks: Sequence[Any], page_index: int) -> int | None:
        """One of the blocks of :meth:`of_request`."""

    def used_by_hits(self, key: Hashable) -> int | None:
        """The KV block in which a request with this block hash finds its tokens now."""


class KVBlocks:
    """KV blocks of the group that has one for every token, if the model has such a group.

    Other groups hold a sliding window or a state; most of their blocks are null, hence not known.
    No block is known where one holds several pages, for then a hit on some of them copies it.

    Args:
        kv_cache_manager: vLLM's.
        page_size: tokens of a page and of a KV block hash.

    """

    def __init__(self, kv_cache_manager: Any, page_size: int) -> None:
        from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

        managers = kv_cache_manager.coordinator.single_type_managers
        whole = [i for i, m in enumerate(managers) if isinstance(m, FullAttentionManager)]
        self._group = whole[0] if whole else 0
        self._are_pages = managers[self._group].block_size == page_size
        self._blocks_of = managers[self._group].req_to_blocks
        self._cached_block = kv_cache_manager.block_pool.get_cached_block

    def of_request(self, request_id: str) -> Sequence[Any]:
        """VLLM's own list: it extends it, and begins another when it has taken the blocks away."""
        return self._blocks_of.get(request_id, ()) if self._are_pages else ()

    def number(self, blocks: Sequence[Any], page_index: int) -> int | None:
        """The block's id, if there is a block and it is not null."""
        if page_index >= len(blocks) or blocks[page_index].is_null:
            return None
        return int(blocks[page_index].block_id)

    def used_by_hits(self, key: Hashable) -> int | None:
        """Of several cached blocks with one hash, vLLM uses the first."""
        cached = self._cached_block(key, [self._group])
        return None if cached is None else int(cached[0].block_id)
