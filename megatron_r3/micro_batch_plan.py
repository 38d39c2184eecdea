"""The layout plan of a micro-batch from what a trainer hands to Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_r3.errors import RowCountError
from megatron_r3.layout_plan import LayoutPlan
from megatron_r3.shard import Shard


def micro_batch_plan(
    packed_seq_params: Any,
    host_lengths: Sequence[int] | None,
    padded_lengths: Sequence[int] | None,
    seq_length: int | None,
    shard: Shard,
) -> LayoutPlan:
    """See :meth:`megatron_r3.Controller.feed` for the arguments.

    Raises:
        RowCountError: lengths that are not known on the host, or that do not fit.

    """
    if packed_seq_params is None:
        if host_lengths is None:
            raise RowCountError(
                "feed() got neither host_lengths nor packed_seq_params, expected the tokens of "
                "each sample: pass host_lengths=[...]."
            )
        return LayoutPlan.padded(host_lengths, seq_length, shard=shard)
    padded = packed_seq_params.cu_seqlens_q_padded
    if padded_lengths is None:
        padded_lengths = _host_lengths(packed_seq_params.cu_seqlens_q if padded is None else padded)
    if padded_lengths is None and padded is not None:
        raise RowCountError(
            "cu_seqlens_q_padded lies on a GPU, expected it on the host, since reading it would "
            "synchronise: pass padded_lengths=[...]."
        )
    if host_lengths is None:
        host_lengths = _host_lengths(packed_seq_params.cu_seqlens_q)
    if host_lengths is None:
        raise RowCountError(
            "cu_seqlens_q lies on a GPU, expected the lengths on the host, since reading it would "
            "synchronise: pass host_lengths=[...]."
        )
    shard = _dynamic_shard(packed_seq_params, shard)
    plan = LayoutPlan.packed(host_lengths, padded_lengths, seq_length, shard)
    tokens_per_sample = getattr(packed_seq_params, "tokens_per_sample", None)
    return plan if tokens_per_sample is None else plan.unflattened(tokens_per_sample)


def _dynamic_shard(packed_seq_params: Any, shard: Shard) -> Shard:
    """The micro-batch's own context-parallel size and rank, where it has them."""
    size = getattr(packed_seq_params, "local_cp_size", None)
    if size is None:
        return shard
    group = packed_seq_params.cp_group
    if size > 1 and (group is None or group.size() != size):
        raise RowCountError(
            f"packed_seq_params has local_cp_size {size} and a cp_group of "
            f"{'none' if group is None else group.size()}, expected a group of {size} ranks: set "
            "both as get_batch_on_this_hybrid_cp_rank does."
        )
    return replace(shard, cp_size=size, cp_rank=0 if size == 1 else group.rank())


def _host_lengths(cu_seqlens: torch.Tensor) -> list[int] | None:
    if cu_seqlens.device.type != "cpu":
        return None
    lengths: list[int] = np.diff(cu_seqlens.numpy()).tolist()
    return lengths
