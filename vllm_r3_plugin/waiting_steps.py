"""Steps whose rows have arrived and wait to be stored, since many together take far less time."""

from __future__ import annotations

from typing import Any, NamedTuple

from shared_schema import RoutingLayout
from vllm_r3_plugin.journal import Journal
from vllm_r3_plugin.step_rows import StepRows, capture_dtype

_STEP_NBYTES = 1 << 20
"""A step of this size never waits: before vLLM 0.32 its array may be a view of shared memory that
the worker writes again."""

_NBYTES = 2 << 20
"""What waits at most: more would save little, and store for milliseconds at a time."""


class WaitingStep(NamedTuple):
    """A step's rows, and how many requests and tokens vLLM had scheduled."""

    rows: StepRows
    num_requests: int
    num_tokens: int


class WaitingSteps:
    """Steps in the order in which they ran.

    Args:
        layout: shape of a row.
        max_tokens: longest sequence.
        max_steps: steps that wait at most.
        journal: where rows that do not fit are noted.

    """

    def __init__(
        self, layout: RoutingLayout, max_tokens: int, max_steps: int, journal: Journal
    ) -> None:
        self._row = layout.num_moe_layers, layout.top_k
        self._dtype = capture_dtype(layout.num_experts, layout.top_k)
        self._max_tokens = max_tokens
        self._max_steps = max_steps
        self._journal = journal
        self._steps: list[WaitingStep] = []
        self._nbytes = 0

    def __bool__(self) -> bool:
        return bool(self._steps)

    @property
    def are_due(self) -> bool:
        """Whether none may wait any longer: there are enough, or they take too much."""
        return len(self._steps) >= self._max_steps or self._nbytes >= _NBYTES

    def add(self, rows: StepRows, scheduled: Any) -> None:
        """Let a step wait; ``scheduled`` is vLLM's ``SchedulerOutput`` of it."""
        nbytes, num_tokens = rows.ids.nbytes, scheduled.total_num_scheduled_tokens
        self._steps.append(WaitingStep(rows, len(scheduled.num_scheduled_tokens), num_tokens))
        self._nbytes += nbytes if nbytes < _STEP_NBYTES else _NBYTES

    def take(self) -> list[WaitingStep]:
        """All of them; none wait any longer."""
        steps, self._steps, self._nbytes = self._steps, [], 0
        return steps

    def fitting(self, steps: list[WaitingStep]) -> list[StepRows]:
        """Rows of those steps that can be what they say."""
        found = []
        for step in steps:
            misfit = step.rows.misfit(self._row, self._dtype, self._max_tokens, *step[1:])
            if misfit is None:
                found.append(step.rows)
            else:
                self._journal.note("MISFIT", f"a step's rows are not used: they hold {misfit}")
        return found
