"""Which requests' rows a step holds: the one place that knows the model runners' batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class RunnerBatch(NamedTuple):
    """The batch of the step that has just been launched."""

    request_ids: list[str]
    num_tokens: np.ndarray[Any, Any]
    """``[R]`` rows of each request, in batch order."""
    positions: torch.Tensor
    """``[N]`` on the device: what the forward used, also where the host only guesses."""


def batch_of(runner: Any, num_rows: int) -> RunnerBatch:
    """Read a V1 or V2 runner's batch of ``num_rows`` tokens, after its forward, before sampling."""
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)
    if batch is not None:  # V2
        num_tokens = np.array(batch.num_scheduled_tokens[: batch.num_reqs])
        positions = batch.positions
    else:
        batch = runner.input_batch
        num_tokens = runner.num_scheduled_tokens.np[: batch.num_reqs].copy()
        positions = runner.positions
    return RunnerBatch(list(batch.req_ids), num_tokens, positions[:num_rows])
