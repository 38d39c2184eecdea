"""How much memory routing may take, from the engine's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared_schema import RoutingLayout
from vllm_r3_plugin.options import R3Options
from vllm_r3_plugin.step_rows import capture_dtype


@dataclass(frozen=True)
class MemoryBounds:
    """The formula, with an engine's numbers.

    Attributes:
        layout: the layers that route.
        step_tokens: tokens of the largest step.
        page_size: tokens of a page of rows.
        cached_tokens: tokens that the KV cache holds.
        num_requests: requests that run at once.
        request_tokens: tokens of the longest.
        max_bytes: the user's limit on host memory, or None.
        loads_kv: whether a KV connector may load what the KV cache has long forgotten.

    """

    layout: RoutingLayout
    step_tokens: int
    page_size: int
    cached_tokens: int
    num_requests: int
    request_tokens: int
    max_bytes: int | None
    loads_kv: bool = False

    @classmethod
    def of(cls, scheduler: Any, layout: RoutingLayout) -> MemoryBounds:
        """Read them from a scheduler of vLLM."""
        config = scheduler.vllm_config
        return cls(
            layout,
            config.scheduler_config.max_num_batched_tokens,
            scheduler.hash_block_size,
            config.cache_config.num_gpu_blocks * config.cache_config.block_size,
            scheduler.max_num_running_reqs,
            scheduler.max_model_len,
            R3Options.of(config).max_bytes,
            config.kv_transfer_config is not None,
        )

    @property
    def device_nbytes(self) -> int:
        """Bytes on the device of a worker that runs all layers: one step's rows, twice."""
        layout = self.layout
        itemsize = capture_dtype(layout.num_experts, layout.top_k).itemsize
        # The capture buffer, and the rows set aside from it on their way to the host.
        return 2 * self.step_tokens * layout.num_moe_layers * layout.top_k * itemsize

    @property
    def cached_pages(self) -> int:
        """Pages kept for hits: what the KV cache holds, or all that are granted to a connector."""
        if self.loads_kv and self.max_bytes is not None:
            return self.max_pages
        return -(-self.cached_tokens // self.page_size)

    @property
    def max_pages(self) -> int:
        """Pages of rows at most."""
        if self.max_bytes is not None:
            return self.max_bytes // (self.page_size * self.layout.row_nbytes)
        # A request may outlive its part of the KV cache: finished or preempted, with rows to read.
        return self.cached_pages + self.num_requests * -(-self.request_tokens // self.page_size)

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory in the engine core at most."""
        return self.max_pages * self.page_size * self.layout.row_nbytes

    def __str__(self) -> str:
        """One sentence for the log."""
        layout = self.layout
        host = "max_bytes"
        if self.max_bytes is None:
            host = (
                f"{self.cached_tokens:,} tokens of the KV cache and {self.num_requests:,} requests "
                f"of {self.request_tokens:,} tokens, {layout.row_nbytes:,} bytes each"
            )
        return (
            f"routing takes {self.device_nbytes:,} bytes on each worker's device "
            f"(2 x {self.step_tokens:,} tokens of a step x {layout.num_moe_layers} MoE layers x "
            f"{layout.top_k} experts) and at most {self.host_nbytes:,} bytes of host memory in the "
            f"engine core, touched only where used ({host})"
        )
