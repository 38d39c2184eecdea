"""What one schedule recorded or replayed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_r3.errors import LayoutMismatchError, ReplayStateError, RowCountError
from megatron_r3.frames import Frame, RowCounts, RowKind
from megatron_r3.gather import gather_recorded
from megatron_r3.groups import Groups
from megatron_r3.layout_plan import LayoutPlan
from megatron_r3.metrics import ReplayMetrics, reduced_metrics
from megatron_r3.router_calls import Mode
from shared_schema import RoutedExpertsBatch, RoutingLayout


@dataclass(frozen=True)
class ScheduleReport:
    """Counters of one schedule on this rank; nothing was read from a device for them.

    Attributes:
        mode: of the schedule.
        micro_batches: that were fed, over all chunks.
        rows: rows of these by kind.
        recomputes: router calls that repeated a forward in a backward pass.

    """

    mode: Mode
    micro_batches: int
    rows: RowCounts
    recomputes: int


class Schedule:
    """One ``with ctl.schedule(...)`` block; its results are there when the block has ended.

    Attributes:
        report: counters of this rank.

    """

    report: ScheduleReport

    def __init__(self, mode: Mode, layout: RoutingLayout, groups: Groups) -> None:
        self.mode: Mode = mode
        self._layout = layout
        self._groups = groups
        self._chunks: list[tuple[Sequence[int], list[Frame]]] = []

    def finish(self, chunks: Sequence[tuple[Sequence[int], list[Frame]]]) -> None:
        """Take over the frames of every chunk, with the indices of its layers, and count."""
        self._chunks = list(chunks)
        frames = [frame for _, fed in chunks for frame in fed]
        self.report = ScheduleReport(
            mode=self.mode,
            micro_batches=len(frames),
            rows=sum((frame.counts for frame in frames), RowCounts()),
            recomputes=sum(sum(frame.recomputes) for frame in frames),
        )
        if self.mode == "replay":
            for frame in frames:
                frame.release()

    def metrics(self) -> ReplayMetrics:
        """Rows by kind and sampled agreement, of each layer and in total, over all ranks.

        A collective: every rank has to call it. It is the one place that waits for the device.

        Raises:
            ReplayStateError: the schedule has not ended.

        """
        self._check_ended("metrics()")
        return reduced_metrics(self._chunks, self._layout, self._groups)

    def gather(self) -> RoutedExpertsBatch:
        """The experts that the routers chose, one row for every token, samples as they were fed.

        Collects the rows and layers of all ranks that hold this rank's data (tensor, context and
        pipeline parallel, not data parallel), which all have to call it and all get the same. Where
        the update runs the same micro-batches, ``feed(chunk, recording[n])`` moves nothing instead.

        Raises:
            ReplayStateError: not a recording that has ended, or tokens or layers that no rank has.

        """
        self._check_recorded("gather()")
        return gather_recorded(self._chunks, self._layout, self._groups)

    def __getitem__(self, micro_batch: int) -> RecordedMicroBatch:
        """Micro-batch ``micro_batch`` of a recording that has ended, for ``feed``."""
        self._check_recorded(f"[{micro_batch}]")
        return RecordedMicroBatch(self, micro_batch)

    def frame(
        self,
        micro_batch: int,
        chunk: int,
        layers: Sequence[int],
        plan: LayoutPlan | None,
    ) -> Frame:
        """What a chunk recorded in a micro-batch.

        Args:
            micro_batch: its number in the recording.
            chunk: number of the chunk.
            layers: L-axis positions of that chunk's layers in the model that will use it.
            plan: what each row is in the batch that will use it, where the caller knows.

        Raises:
            LayoutMismatchError: another model or another split of it.
            RowCountError: no such micro-batch, or one with other rows.

        """
        held = [tuple(layers) for layers, _ in self._chunks]
        if chunk >= len(held) or held[chunk] != tuple(layers):
            raise LayoutMismatchError(
                f"the recording has the MoE layers {held} in its chunks, expected "
                f"{tuple(layers)} in chunk {chunk}: gather() it, since the model is split anew."
            )
        frames = self._chunks[chunk][1]
        if not 0 <= micro_batch < len(frames):
            raise RowCountError(
                f"micro-batch {micro_batch} was asked of a recording of {len(frames)}, expected "
                "a number below that: count micro-batches as they were fed."
            )
        frame = frames[micro_batch]
        if plan is not None and not frame.plan.same_rows(plan):
            raise RowCountError(
                f"micro-batch {micro_batch} was recorded with samples of "
                f"{frame.plan.lengths.tolist()} tokens in {frame.num_rows} rows, expected the "
                f"{plan.lengths.tolist()} tokens in {plan.num_rows} rows of this one in the same "
                "order: gather() the recording, since the batch is split anew."
            )
        return frame

    def explain(self, micro_batch: int, chunk: int = 0) -> str:
        """Which positions of which sample were replayed in a micro-batch, for people to read."""
        frame = self._chunks[chunk][1][micro_batch]
        lines = [f"micro-batch {micro_batch} of chunk {chunk}: {frame.counts}"]
        for sample in range(len(frame.plan.lengths)):
            rows = np.flatnonzero(frame.plan.sample == sample)
            positions = frame.plan.position[rows]
            order = np.argsort(positions)
            cells = zip(positions[order].tolist(), frame.kinds[rows[order]].tolist(), strict=True)
            spans = []
            for kind, run in itertools.groupby(cells, key=lambda cell: cell[1]):
                held = [position for position, _ in run]
                spans.append(f"{RowKind(kind).name.lower()} {held[0]}…{held[-1]}")
            lines.append(f"  sample {sample}: {', '.join(spans) or 'no token on this rank'}")
        return "\n".join(lines)

    def _check_ended(self, what: str) -> None:
        if not hasattr(self, "report"):
            raise ReplayStateError(
                f"{what} was called on a schedule({self.mode!r}) that is open or was left by an "
                "error, expected one that has ended: call it behind the with block."
            )

    def _check_recorded(self, what: str) -> None:
        self._check_ended(what)
        if self.mode != "record":
            raise ReplayStateError(
                f"{what} was called on a schedule({self.mode!r}), expected a recording: open "
                "schedule('record')."
            )


@dataclass(frozen=True)
class RecordedMicroBatch:
    """One micro-batch of a recording, to be fed to a replay; made by ``recording[n]``."""

    recording: Schedule
    number: int

    def frame(self, chunk: int, layers: Sequence[int], plan: LayoutPlan | None) -> Frame:
        """What ``chunk`` recorded, see :meth:`Schedule.frame`."""
        return self.recording.frame(self.number, chunk, layers, plan)
