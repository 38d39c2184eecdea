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
    """``[at least N]`` on the device: what the forward used, also where the host only guesses."""


def batch_of(runner: Any, last_request_ids: list[str]) -> RunnerBatch:
    """Read a V1 or V2 runner's batch, after its forward, before sampling.

    Where the requests are those of the step before, ``last_request_ids`` is used again: the copy of
    a long list costs a visit to each of its strings, also when it is thrown away.
    """
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None)
    if batch is not None:  # V2
        num_tokens = np.array(batch.num_scheduled_tokens[: batch.num_reqs])
        positions = batch.positions
    else:
        batch = runner.input_batch
        num_tokens = runner.num_scheduled_tokens.np[: batch.num_reqs].copy()
        positions = runner.positions
    same = batch.req_ids == last_request_ids
    return RunnerBatch(last_request_ids if same else list(batch.req_ids), num_tokens, positions)
