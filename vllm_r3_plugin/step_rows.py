"""What one forward pass of one worker recorded, on its way to the engine core."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt

from shared_schema import RowStatus

STEP_ROWS_ATTRIBUTE = "moe_r3_step_rows"
"""The attribute of ``ModelRunnerOutput`` on which a :class:`StepRows` travels."""


def capture_dtype(num_experts: int, top_k: int) -> np.dtype[Any]:
    """The dtype in which ids are captured: the narrowest in which no choice looks unwritten.

    Where a token has several experts, all of them equal to the largest value is no choice, so 256
    experts fit uint8; with one expert the largest value must not be an id.
    """
    largest_id = num_experts - 1 if top_k > 1 else num_experts
    return np.dtype(np.uint8 if largest_id < 256 else np.uint16)


class StepRows(NamedTuple):
    """Routed experts of one step, in the order in which the model runner batched the requests.

    Attributes:
        request_ids: R requests of the batch, in batch order.
        num_tokens: ``[R]`` rows that each of them has in this step; they sum to N.
        positions: ``[N]`` sequence position of each row, as the device used it.
        ids: ``[N, L, k]`` logical expert ids; anything that broadcasts to it where ``status`` says
            that they are worth nothing.
        status: why the rows of this step are worth nothing, or ``RECORDED``.
        events: what the worker counted since its last step, and how often.

    """

    request_ids: list[str]
    num_tokens: Int[np.ndarray, " R"]
    positions: Int[np.ndarray, " N"]
    ids: UInt[np.ndarray, "N L k"]
    status: RowStatus = RowStatus.RECORDED
    events: tuple[tuple[str, int], ...] = ()

    def misfit(
        self,
        row: tuple[int, int],
        dtype: np.dtype[Any],
        max_tokens: int,
        num_requests: int,
        num_tokens: int,
    ) -> str | None:
        """Say why these cannot be the rows of a step, if they cannot.

        Args:
            row: L and k.
            dtype: of ids.
            max_tokens: longest sequence.
            num_requests: requests that were scheduled.
            num_tokens: tokens that were scheduled.

        """
        num_rows, positions, ids = len(self.positions), self.positions, self.ids
        checks: tuple[tuple[str, object, object], ...] = (
            ("requests", len(self.request_ids), num_requests),
            ("positions", positions.shape, (num_tokens,)),
            ("request lengths", self.num_tokens.shape, (len(self.request_ids),)),
            ("tokens in all requests", np.add.reduce(self.num_tokens), num_rows),
        )
        if self.status == RowStatus.RECORDED:
            checks += (("ids", (ids.shape, ids.dtype), ((num_rows, *row), dtype)),)
        for name, seen, expected in checks:
            if seen != expected:
                return f"{name} {seen}, expected {expected}"
        # One look: seen as unsigned, what is below 0 is beyond the largest.
        if positions.view(f"u{positions.itemsize}").max() >= max_tokens:
            return (
                f"positions from {positions.min()} to {positions.max()}, expected 0 to "
                f"{max_tokens - 1}"
            )
        return None
