"""What vLLM's forward context says about the rows that a router sees, where it may see others."""

from __future__ import annotations

from typing import Any

import torch

from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.row_layout import own_rows

_OFFSET = "moe_r3_offset"


class ForwardLayout:
    """Takes this rank's tokens from the routers' batches, under data and expert parallelism.

    It is asked in the forward, where CUDA graphs are recorded: vLLM pads every rank to the same
    size there, so that a graph's layout is that of its replays.

    Args:
        rank: data-parallel rank.
        tp_size: tensor-parallel size.
        journal: where a batch of unknown layout is noted.

    """

    def __init__(self, rank: int, tp_size: int, journal: Journal) -> None:
        self._rank = rank
        self._tp_size = tp_size
        self._journal = journal

    @classmethod
    def of(cls, parallel_config: Any, journal: Journal) -> ForwardLayout | None:
        """``None`` where routers see the step's own tokens only, which needs no asking."""
        tp_size = parallel_config.tensor_parallel_size
        if (
            parallel_config.data_parallel_size == 1
            and not parallel_config.use_ubatching
            and not (parallel_config.enable_expert_parallel and tp_size > 1)
        ):
            return None
        return cls(parallel_config.data_parallel_rank, tp_size, journal)

    def write_own_rows(self, column: torch.Tensor, ids: torch.Tensor) -> None:
        """Write those of a router's ``ids`` ``[n, k]`` that are this rank's to ``column``.

        Where that cannot be told nothing is written: the step is then found to be unrecorded.
        """
        with self._journal.guard("placing a router's rows"):
            self._write(column, ids)

    def _write(self, column: torch.Tensor, ids: torch.Tensor) -> None:
        from vllm.distributed.parallel_state import get_tp_group
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        dp = context.dp_metadata
        if dp is not None:
            num_tokens, rank, shards = (
                dp.num_tokens_across_dp_cpu.tolist(),
                self._rank,
                dp.local_sizes,
            )
        elif context.batch_descriptor is not None:
            num_tokens, rank, shards = [context.batch_descriptor.num_tokens], 0, None
        else:
            num_tokens, rank, shards = [len(ids)], 0, None
        rows = own_rows(len(ids), num_tokens, rank, self._tp_size, shards)
        if rows is None:
            self._journal.note(
                "UNKNOWN_ROW_LAYOUT",
                f"a router routed {len(ids)} rows, expected {num_tokens[rank]} tokens or a layout "
                f"of them (data-parallel ranks {num_tokens}, rank {rank}, tensor-parallel size "
                f"{self._tp_size}, gathered shards {shards}): its step is unrecorded",
            )
            return
        if rows.gathered:
            # As floats of the same bits: CPU workers gather no integers.
            bits = ids.to(torch.int32).contiguous().view(torch.float32)
            ids = get_tp_group().all_gather(bits, dim=0).view(torch.int32)
        offset = _ubatch_offset(context, rank)
        column[offset : offset + rows.stop - rows.start] = ids[rows.start : rows.stop]


def _ubatch_offset(context: Any, rank: int) -> int:
    """First row of the micro-batch that this thread runs, under dual-batch overlap.

    Later than at its first router an earlier micro-batch may be done, and its size forgotten.
    """
    from vllm.v1.worker import ubatching

    if not ubatching.dbo_enabled():
        return 0
    kept: dict[str, int] = context.additional_kwargs
    if _OFFSET not in kept:
        earlier = ubatching._CURRENT_CONTEXTS[: ubatching.dbo_current_ubatch_id()]
        kept[_OFFSET] = sum(
            int(ubatch.forward_context.dp_metadata.num_tokens_across_dp_cpu[rank])
            for ubatch in earlier
        )
    return kept[_OFFSET]
