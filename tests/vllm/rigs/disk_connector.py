"""A KV connector as users write them: keeps every full KV block in a folder, under its hash.

vLLM's own offloading connectors need a GPU. This one loads at once or while requests wait, can be
made to lose blocks, and serves several engines from one folder.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)


def kv_transfer_config(folder: Path) -> dict[str, Any]:
    """What an engine needs to use this connector."""
    return {
        "kv_connector": "DiskConnector",
        "kv_connector_module_path": __name__,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"folder": str(folder)},
    }


@dataclass
class _Transfers(KVConnectorMetadata):
    # The file of a block and its place in the KV cache.
    loads: list[tuple[Path, int]] = field(default_factory=list)
    saves: list[tuple[Path, int]] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)


class DiskConnector(KVConnectorBase_V1):
    # Of the scheduler's part and the worker's, which share a process in the tests.
    loads_wait = False
    num_loaded = 0
    fails_at: int | None = None
    """Index of the block of each sequence that cannot be loaded."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._folder = Path(vllm_config.kv_transfer_config.get_from_extra_config("folder", ""))
        self._block_size = vllm_config.cache_config.block_size
        self._requests: dict[str, Any] = {}
        self._first_block: dict[str, int] = {}
        self._transfers = _Transfers()

    # --- the scheduler's part ---

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self._block_ids = kv_cache_manager.get_block_ids

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        first = num_computed_tokens // self._block_size
        last = (request.num_tokens - 1) // self._block_size
        found = [path.exists() for path in self._paths(request)[first:last]]
        count = [*found, False].index(False)
        self._first_block[request.request_id] = first
        return count * self._block_size, self.loads_wait and count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external: int) -> None:
        self._requests[request.request_id] = request
        if num_external:
            first = self._first_block[request.request_id]
            (ids,) = blocks.get_block_ids()
            pairs = list(zip(self._paths(request), ids, strict=False))
            self._transfers.loads += pairs[first : first + num_external // self._block_size]
            if self.fails_at is not None and first <= self.fails_at:
                self._transfers.lost.add(ids[self.fails_at])
            if self.loads_wait:
                self._transfers.waiting.add(request.request_id)
            type(self).num_loaded += num_external

    def build_connector_meta(self, scheduler_output: Any) -> _Transfers:
        transfers, self._transfers = self._transfers, _Transfers()
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self._requests[name]
            num_full = (request.num_computed_tokens + count) // self._block_size
            pairs = zip(self._paths(request)[:num_full], self._block_ids(name)[0], strict=False)
            transfers.saves += [(path, block) for path, block in pairs if not path.exists()]
        return transfers

    def reset_cache(self) -> bool:
        for path in self._folder.iterdir():
            path.unlink()
        return True

    def _paths(self, request: Any) -> list[Path]:
        return [self._folder / block_hash.hex() for block_hash in request.block_hashes]

    # --- the worker's part ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._kv_caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        transfers = self._get_connector_metadata()
        for path, block in transfers.loads:
            layers = torch.load(path)
            for name, cache in self._kv_caches.items():
                cache[block] = 0 if block in transfers.lost else layers[name]

    def wait_for_save(self) -> None:
        transfers = self._get_connector_metadata()
        for path, block in [] if transfers.lost else transfers.saves:
            torch.save(
                {name: cache[block].clone() for name, cache in self._kv_caches.items()}, path
            )

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._get_connector_metadata().lost

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        return None, self._get_connector_metadata().waiting

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        pass
