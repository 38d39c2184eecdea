"""What one forward pass of one worker recorded, on its way to the engine core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Integer, UInt

from shared_schema import RowStatus

STEP_ROWS_ATTRIBUTE = "moe_r3_step_rows"
"""The attribute of ``ModelRunnerOutput`` on which a :class:`StepRows` travels."""


@dataclass(frozen=True)
class StepRows:
    """Routed experts of one step, in the order in which the model runner batched the requests.

    Attributes:
        request_ids: R requests of the batch, in batch order.
        num_tokens: ``[R]`` rows that each of them has in this step; they sum to N.
        positions: ``[N]`` sequence position of each row, as the device used it.
        ids: ``[N, L, k]`` logical expert ids.
        status: why the rows of this step are worth nothing, or ``RECORDED``.

    """

    request_ids: list[str]
    num_tokens: Int[np.ndarray, " R"]
    positions: Int[np.ndarray, " N"]
    ids: UInt[np.ndarray, "N L k"]
    status: RowStatus = RowStatus.RECORDED


def step_status(
    ids: Integer[np.ndarray, "N L k"], num_experts: int, fill_id: int
) -> tuple[RowStatus, str]:
    """Judge a step's rows; returns the status and, unless recorded, what is wrong.

    The first and the last row were filled with ``fill_id`` before the forward, and a router writes
    all rows at once. So a layer that did not run, or ran on fewer tokens, still shows the fill.
    """
    unwritten = (ids[[0, -1]] == fill_id).all(-1).any(0)
    if unwritten.any():
        layers = np.flatnonzero(unwritten).tolist()
        return RowStatus.CAPTURE_FAILED, f"the router of MoE layers number {layers} did not report"
    if num_experts <= np.iinfo(ids.dtype).max and (largest := int(ids.max())) >= num_experts:
        return RowStatus.INVALID, f"expert id {largest} of {num_experts} experts"
    return RowStatus.RECORDED, ""


def capture_dtype(num_experts: int, top_k: int) -> np.dtype[Any]:
    """The dtype in which ids are captured: the narrowest in which the fill cannot be a choice.

    Where a token has several experts, all of them equal to the fill is no choice, so 256 experts
    fit uint8; with one expert the fill must not be an id.
    """
    largest_id = num_experts - 1 if top_k > 1 else num_experts
    return np.dtype(np.uint8 if largest_id < 256 else np.uint16)
