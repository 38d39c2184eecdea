"""Loses a share of the workers' payloads on purpose, between the capture and the engine core."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def losing_payloads(share: float, seed: int = 0) -> Iterator[list[bool]]:
    """Each step's payload is lost with probability `share`; yields one entry a step, True if lost.

    Workers of this process only.
    """
    from vllm_r3_plugin import step_capture

    rng = np.random.default_rng(seed)
    lost: list[bool] = []
    attach = step_capture.attach_rows

    def attach_rows(output: Any, rows: Any) -> None:
        lost.append(bool(rng.random() < share))
        if not lost[-1]:
            attach(output, rows)

    step_capture.attach_rows = attach_rows
    try:
        yield lost
    finally:
        step_capture.attach_rows = attach
