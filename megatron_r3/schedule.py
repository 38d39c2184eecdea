"""What one schedule recorded or replayed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_r3.errors import ReplayStateError
from megatron_r3.frames import Frame, RowCounts, RowKind
from megatron_r3.router_calls import Mode
from shared_schema import RoutedExpertsBatch, RoutingLayout, Source, Span


@dataclass(frozen=True)
class ScheduleReport:
    """Counters of one schedule on this rank.

    Attributes:
        mode: of the schedule.
        micro_batches: that were fed, over all chunks.
        rows: rows of these by kind.
        recomputes: router calls that repeated a forward in a backward pass.
        agreement: share of replayed slots that the router would have chosen itself, in the
            sampled micro-batches, by position on the L axis of routes.

    """

    mode: Mode
    micro_batches: int
    rows: RowCounts
    recomputes: int
    agreement: dict[int, float] = field(default_factory=dict)


class Schedule:
    """One ``with ctl.schedule(...)`` block; its results are there when the block has ended.

    Attributes:
        report: counters.

    """

    report: ScheduleReport

    def __init__(self, mode: Mode, layout: RoutingLayout) -> None:
        self.mode: Mode = mode
        self._layout = layout
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
            agreement=self._agreement(),
        )
        if self.mode == "replay":
            for frame in frames:
                frame.release()

    def recorded(self) -> RoutedExpertsBatch:
        """The experts that the routers chose, one row for every token, samples as they were fed.

        Raises:
            ReplayStateError: not a finished recording, or this rank does not hold all tokens and
                layers.

        """
        if self.mode != "record" or not hasattr(self, "report"):
            raise ReplayStateError(
                f"recorded() was called on a schedule({self.mode!r}) "
                f"{'that has ended' if hasattr(self, 'report') else 'that is open'}, expected a "
                "recording that has ended: call it behind the with block of schedule('record')."
            )
        held = sorted(layer for layers, _ in self._chunks for layer in layers)
        if held != list(range(self._layout.num_moe_layers)):
            raise ReplayStateError(
                f"this rank recorded the MoE layers with indices {held}, expected all "
                f"{self._layout.num_moe_layers}: routes can be read where one rank holds the model."
            )
        with_routers = [(layers, frames) for layers, frames in self._chunks if layers]
        micro_batches = zip(*(frames for _, frames in with_routers), strict=True)
        layers = [layers for layers, _ in with_routers]
        batches = [self._joined(layers, frames) for frames in micro_batches]
        if not batches:
            raise ReplayStateError(
                "the schedule recorded no micro-batch, expected one or more: call feed() before "
                "each forward."
            )
        return RoutedExpertsBatch.concat(batches)

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

    def _joined(
        self, layers: Sequence[Sequence[int]], frames: Sequence[Frame]
    ) -> RoutedExpertsBatch:
        lengths = frames[0].plan.lengths
        if (np.sort(frames[0].plan.token_index())[-int(lengths.sum()) :] < 0).any():
            raise ReplayStateError(
                f"this rank holds {int((~frames[0].plan.is_padding).sum())} of the "
                f"{int(lengths.sum())} tokens of micro-batch {frames[0].micro_batch}, expected all "
                "of them: routes can be read where one rank holds the sequences."
            )
        values = np.empty(
            (int(lengths.sum()), self._layout.num_moe_layers, self._layout.top_k),
            self._layout.dtype,
        )
        for local, frame in zip(layers, frames, strict=True):
            values[:, list(local)] = frame.recorded_rows(self._layout.fill_id)
        return RoutedExpertsBatch(
            values,
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            self._layout,
            spans=tuple((Span(0, int(n), Source.TRAINER),) if n else () for n in lengths),
        )

    def _agreement(self) -> dict[int, float]:
        shares: dict[int, float] = {}
        for layers, frames in self._chunks:
            sampled = [(f.agreement, f.counts) for f in frames if f.agreement is not None]
            slots = sum(counts.replayed for _, counts in sampled) * self._layout.top_k
            if slots:
                same = torch.stack([agreement for agreement, _ in sampled]).sum(0).tolist()
                shares |= {layer: n / slots for layer, n in zip(layers, same, strict=True)}
        return shares
