"""The process groups over which the rows and layers of one model's routes are spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from megatron.core import parallel_state


@dataclass(frozen=True)
class Groups:
    """Groups of this rank; ``None`` where it is the only one.

    Attributes:
        tokens: the ranks that hold the rows of one batch: tensor (with sequence parallelism) and
            context parallel.
        rows: the ranks that hold the rows of all batches: tensor, context and data parallel.
        row_copies: how many ranks of ``rows`` hold each row: the tensor-parallel ones without
            sequence parallelism.
        pipeline: the ranks that hold the layers.
        ep_size: expert-parallel ranks.
        ep_rank: this rank among them.

    """

    tokens: Any = None
    rows: Any = None
    row_copies: int = 1
    pipeline: Any = None
    ep_size: int = 1
    ep_rank: int = 0


def groups_of(routers: Sequence[Any]) -> Groups:
    """The groups of a model chunk's routers; a stage without routers has a pipeline only."""
    pipeline = parallel_state.get_pipeline_model_parallel_group(check_initialized=False)
    if not routers:
        return Groups(pipeline=_if_shared(pipeline))
    router = routers[0]
    experts = parallel_state.get_expert_model_parallel_group(check_initialized=False)
    sequence_parallel = router.config.sequence_parallel
    return Groups(
        tokens=_if_shared(router.tp_cp_group if sequence_parallel else router.cp_group),
        rows=_if_shared(router.tp_dp_cp_group),
        row_copies=1 if sequence_parallel else router.tp_group.size(),
        pipeline=_if_shared(pipeline),
        ep_size=1 if experts is None else experts.size(),
        ep_rank=0 if experts is None else experts.rank(),
    )


def _if_shared(group: Any) -> Any:
    return None if group is None or group.size() == 1 else group


def all_reduced(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of every rank's ``tensor``, on the host."""
    if group is None:
        return tensor.cpu()
    total = tensor.to(_device(group), copy=True)
    torch.distributed.all_reduce(total, group=group)
    return total.cpu()


def all_gathered(tensor: torch.Tensor, group: Any) -> list[UInt8[np.ndarray, " bytes"]]:
    """The bytes of every rank's ``tensor`` on the host, however many they are, in rank order.

    As bytes, since NCCL knows no 16-bit integers.
    """
    own = tensor.reshape(-1).view(torch.uint8)
    if group is None:
        return [own.cpu().numpy()]
    own = own.to(_device(group))
    size = torch.tensor([own.numel()], dtype=torch.int64, device=own.device)
    sizes = [torch.empty_like(size) for _ in range(group.size())]
    torch.distributed.all_gather(sizes, size, group=group)
    lengths = torch.cat(sizes).tolist()
    padded = own.new_zeros(max(lengths))
    padded[: own.numel()] = own
    parts = [torch.empty_like(padded) for _ in range(group.size())]
    torch.distributed.all_gather(parts, padded, group=group)
    return [part[:length].cpu().numpy() for part, length in zip(parts, lengths, strict=True)]


def _device(group: Any) -> torch.device:
    if "nccl" in torch.distributed.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
