"""What one forward pass of one worker recorded, on its way to the engine core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from shared_schema import RoutingLayout, RowStatus
from vllm_r3_plugin.capturer import capture_dtype

STEP_ROWS_ATTRIBUTE = "moe_r3_step_rows"
"""The attribute of ``ModelRunnerOutput`` on which a :class:`StepRows` travels."""


@dataclass(frozen=True)
class StepRows:
    """Routed experts of one step, in the order in which the model runner batched the requests.

    Attributes:
        request_ids: R requests of the batch, in batch order.
        num_tokens: ``[R]`` rows that each of them has in this step; they sum to N.
        positions: ``[N]`` sequence position of each row, as the device used it.
        ids: ``[N, L, k]`` logical expert ids; anything that broadcasts to it where ``status`` says
            that they are worth nothing.
        status: why the rows of this step are worth nothing, or ``RECORDED``.
        events: what the worker counted since its last step.

    """

    request_ids: list[str]
    num_tokens: Int[np.ndarray, " R"]
    positions: Int[np.ndarray, " N"]
    ids: UInt[np.ndarray, "N L k"]
    status: RowStatus = RowStatus.RECORDED
    events: dict[str, int] = field(default_factory=dict)

    def misfit(self, layout: RoutingLayout, max_tokens: int, scheduled: Any) -> str | None:
        """Say why these cannot be the rows of a step, if they cannot.

        Args:
            layout: shape of a row.
            max_tokens: longest sequence.
            scheduled: vLLM's ``SchedulerOutput`` of the step.

        """
        num_rows, positions, ids = len(self.positions), self.positions, self.ids
        row = (layout.num_moe_layers, layout.top_k)
        checks: tuple[tuple[str, object, object], ...] = (
            ("requests", len(self.request_ids), len(scheduled.num_scheduled_tokens)),
            ("positions", positions.shape, (scheduled.total_num_scheduled_tokens,)),
            ("request lengths", self.num_tokens.shape, (len(self.request_ids),)),
            ("tokens in all requests", int(self.num_tokens.sum()), num_rows),
        )
        if self.status == RowStatus.RECORDED:
            dtype = capture_dtype(layout.num_experts, layout.top_k)
            checks += (("ids", (ids.shape, ids.dtype), ((num_rows, *row), dtype)),)
        for name, seen, expected in checks:
            if seen != expected:
                return f"{name} {seen}, expected {expected}"
        if positions.min() < 0 or positions.max() >= max_tokens:
            return (
                f"positions from {positions.min()} to {positions.max()}, expected 0 to "
                f"{max_tokens - 1}"
            )
        return None
