"""What one forward pass of one worker recorded, on its way to the engine core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt

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
        ids: ``[N, L, k]`` logical expert ids; anything that broadcasts to it where ``status`` says
            that they are worth nothing.
        status: why the rows of this step are worth nothing, or ``RECORDED``.

    """

    request_ids: list[str]
    num_tokens: Int[np.ndarray, " R"]
    positions: Int[np.ndarray, " N"]
    ids: UInt[np.ndarray, "N L k"]
    status: RowStatus = RowStatus.RECORDED
