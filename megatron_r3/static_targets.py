"""Targets at fixed addresses, for routers inside a captured CUDA graph.

A captured graph runs the kernels of the call that was captured, without Python: it cannot look up
a frame. Here the choice is a fixed series of kernels on a buffer that ``feed`` fills in stream
order before each forward; a sentinel in it leaves a row to the router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_r3 import recompute
from megatron_r3.errors import ReplayStateError, RowCountError
from megatron_r3.frames import Frame

NATIVE = -1


class StaticTargets:
    """The targets of one model chunk.

    Attributes:
        targets: ``[L_local, T, k]`` int32, ``NATIVE`` in rows that route natively.

    """

    def __init__(self, num_layers: int, rows: int, top_k: int, device: torch.device) -> None:
        shape = (num_layers, rows, top_k)
        self.targets = torch.full(shape, NATIVE, dtype=torch.int32, device=device)

    @property
    def rows(self) -> int:
        """T, the rows of every micro-batch."""
        return int(self.targets.shape[1])

    def load(self, frame: Frame) -> None:
        """Let the next forward follow ``frame``.

        Raises:
            RowCountError: a micro-batch of another size than the graph was captured with.

        """
        if frame.num_rows != self.rows:
            raise RowCountError(
                f"micro-batch {frame.micro_batch} has {frame.num_rows} rows on this rank, expected "
                f"the {self.rows} of attach(graph_rows={self.rows}): pad every micro-batch to the "
                "size that the CUDA graphs are captured with."
            )
        self.targets.copy_(frame.ids)
        if frame.native_rows is not None:
            self.targets.index_fill_(1, frame.native_rows, NATIVE)
        # Nothing tells here whether a captured router ran.
        frame.forwards = [1] * len(frame.forwards)

    def clear(self) -> None:
        """Let every row route natively."""
        self.targets.fill_(NATIVE)

    def choose(
        self, layer: int, scores: torch.Tensor, native: Callable[[torch.Tensor], Any]
    ) -> torch.Tensor:
        """``[T, k]`` int64 experts, by kernels that do not depend on the targets' values.

        Args:
            layer: local router.
            scores: ``[T, E]`` what it selects on.
            native: its own choice.

        Raises:
            ReplayStateError: a recompute, for which the buffer may hold another micro-batch.

        """
        if recompute.in_backward():
            raise ReplayStateError(
                "a router is recomputed with attach(graph_rows=...), expected none: leave the MoE "
                "layer out of activation recomputation, or attach without graph_rows."
            )
        own: torch.Tensor = native(scores.detach())[1]
        if scores.shape[0] != self.rows:  # an evaluation outside of the graphs
            return own
        target = self.targets[layer].long()
        return torch.where(target == NATIVE, own, target)
