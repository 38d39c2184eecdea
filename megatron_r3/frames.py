"""The routes of one micro-batch in one model chunk, as its routers use them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8

from megatron_r3.groups import Groups
from megatron_r3.host_buffer import HostBuffer, torch_dtype
from megatron_r3.layout_plan import LayoutPlan
from megatron_r3.local_routes import Routes, read_local_routes
from megatron_r3.policies import Policies, spread_experts
from shared_schema import RoutingLayout

_MARK_BYTES = 3 * 8  # of each row: three indices at most
SAMPLED_ROWS = 128
"""Rows of a sampled micro-batch that are compared with the router's own choice, at most."""


class RowKind(IntEnum):
    """What happens to a row."""

    REPLAYED = 0
    UNRECORDED = 1
    """A token that routes natively: the routes mark it so, or have no row for it."""
    PADDING = 2
    """No token; routes natively or by the policy for padding."""
    RECORDED = 3
    """A token that routes natively and whose choice is kept."""


@dataclass(frozen=True)
class RowCounts:
    """Rows by kind."""

    replayed: int = 0
    unrecorded: int = 0
    padding: int = 0
    recorded: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            self.replayed + other.replayed,
            self.unrecorded + other.unrecorded,
            self.padding + other.padding,
            self.recorded + other.recorded,
        )

    def __str__(self) -> str:
        counts = {kind: getattr(self, kind) for kind in self.__dataclass_fields__}
        return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


@dataclass(eq=False)
class Frame:
    """Experts of one micro-batch for the routers of one chunk, in the order of their rows.

    Attributes:
        ids: ``[L_local, T, k]`` on the routers' device, in the layout's narrow dtype; recording,
            the routers write it.
        kinds: ``[T]`` a :class:`RowKind` for each row, on the host.
        native_rows: ``[N]`` int64 on the device, the rows that route natively; ``None`` where all
            do (recording).
        uncounted_rows: ``[N]`` int64 on the device, the rows that the expert bias leaves out;
            ``None`` where it counts all.
        native_choice: ``[N, k]`` int64 for each local router, what it chose in its native rows, so
            that a recompute repeats it.
        plan: what each row is.
        micro_batch: its number in the schedule, for messages.
        asked_rows: ``[N + M]`` int64 on the device, the rows for which the router's own choice is
            computed: the native ones, then M replayed ones that are compared with it.
        num_sampled: M.
        agreement: ``[L_local, 3]`` float32 sums over the sampled rows, see
            :func:`~megatron_r3.metrics.sample_agreement`; ``None`` where there are none.
        forwards: how often each local router used it in a forward.
        recomputes: how often each local router used it in a recompute.
        uses_left: router calls that may still come.
        backward_follows: whether gradients were on when it was fed.

    """

    ids: torch.Tensor
    kinds: UInt8[np.ndarray, " T"]
    native_rows: torch.Tensor | None
    plan: LayoutPlan
    micro_batch: int
    uncounted_rows: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    asked_rows: torch.Tensor | None = None
    num_sampled: int = 0
    native_choice: list[torch.Tensor | None] = field(init=False)
    forwards: list[int] = field(init=False)
    recomputes: list[int] = field(init=False)
    uses_left: int = field(init=False)
    backward_follows: bool = field(init=False)

    def __post_init__(self) -> None:
        self.native_choice = [None] * len(self.ids)
        self.forwards = [0] * len(self.ids)
        self.recomputes = [0] * len(self.ids)
        self.uses_left = len(self.ids)
        self.backward_follows = torch.is_grad_enabled()

    @classmethod
    def to_record(
        cls,
        plan: LayoutPlan,
        layout: RoutingLayout,
        layers: Sequence[int],
        micro_batch: int,
        device: torch.device,
    ) -> Frame:
        """An empty frame, to be filled by routers that route natively."""
        shape = (len(layers), plan.num_rows, layout.top_k)
        return cls(
            ids=torch.empty(shape, dtype=torch_dtype(layout.dtype), device=device),
            kinds=np.where(plan.is_padding, RowKind.PADDING, RowKind.RECORDED).astype(np.uint8),
            native_rows=None,
            plan=plan,
            micro_batch=micro_batch,
        )

    @classmethod
    def to_replay(
        cls,
        routes: Routes,
        samples: Sequence[int] | None,
        plan: LayoutPlan,
        layout: RoutingLayout,
        layers: Sequence[int],
        micro_batch: int,
        device: torch.device,
        sample_agreement: bool,
        policies: Policies,
        groups: Groups,
    ) -> Frame:
        """Bring routes into the routers' order and onto their device.

        Args:
            routes: see :func:`~megatron_r3.local_routes.read_local_routes`, which raises what is
                wrong with them.
            samples: which of the routes the micro-batch consists of; by default all.
            plan: what each local row is.
            layout: the model's.
            layers: index in the layout's MoE layers of each local router.
            micro_batch: its number in the schedule.
            device: the routers' device.
            sample_agreement: whether to compare with the routers' own choice.
            policies: for padding and for the expert bias.
            groups: over whose expert-parallel ranks padding is spread.

        """
        rows = plan.num_rows
        shape = (len(layers), rows, layout.top_k)
        room = math.prod(shape) * layout.dtype.itemsize
        buffer = HostBuffer(room + _MARK_BYTES * rows, device)
        ids = buffer.reserve(shape, layout.dtype)
        recorded = read_local_routes(routes, plan, layers, layout, ids, samples)
        kinds = np.where(recorded, RowKind.REPLAYED, RowKind.UNRECORDED).astype(np.uint8)
        kinds[plan.is_padding] = RowKind.PADDING
        native = kinds != RowKind.REPLAYED
        if policies.padding == "spread":
            padding = np.flatnonzero(plan.is_padding)
            ids[:, padding] = spread_experts(
                len(padding),
                layers,
                layout.num_experts,
                layout.top_k,
                groups.ep_size,
                groups.ep_rank,
            )
            native[padding] = False
        return cls._marked(
            None, buffer, kinds, native, plan, micro_batch, policies, sample_agreement
        )

    @classmethod
    def to_repeat(
        cls, recorded: Frame, micro_batch: int, sample_agreement: bool, policies: Policies
    ) -> Frame:
        """Replay a recorded micro-batch, padding too, from the ids that are on the device."""
        padding = recorded.kinds == RowKind.PADDING
        kinds = np.where(padding, RowKind.PADDING, RowKind.REPLAYED).astype(np.uint8)
        buffer = HostBuffer(_MARK_BYTES * len(kinds), recorded.ids.device)
        native = np.zeros(len(kinds), bool)
        return cls._marked(
            recorded.ids,
            buffer,
            kinds,
            native,
            recorded.plan,
            micro_batch,
            policies,
            sample_agreement,
        )

    @classmethod
    def _marked(
        cls,
        ids: torch.Tensor | None,
        buffer: HostBuffer,
        kinds: UInt8[np.ndarray, " T"],
        native: Bool[np.ndarray, " T"],
        plan: LayoutPlan,
        micro_batch: int,
        policies: Policies,
        sample_agreement: bool,
    ) -> Frame:
        """A frame whose marks, and ids where none are given, travel in ``buffer``."""
        marks = {"native_rows": np.flatnonzero(native)}
        if policies.bias_counts == "tokens":
            marks["uncounted_rows"] = np.flatnonzero(kinds == RowKind.PADDING)
        elif policies.bias_counts == "replayed":
            marks["uncounted_rows"] = np.flatnonzero(kinds != RowKind.REPLAYED)
        sampled = np.zeros(0, np.int64)
        if sample_agreement:
            sampled = _sample(np.flatnonzero(kinds == RowKind.REPLAYED), SAMPLED_ROWS, micro_batch)
        marks["asked_rows"] = np.concatenate([marks["native_rows"], sampled])
        for mark in marks.values():
            buffer.append(mark)
        parts = buffer.to_device()
        if ids is None:
            ids = parts.pop(0)
        frame = cls(
            ids=ids,
            kinds=kinds,
            plan=plan,
            micro_batch=micro_batch,
            **dict(zip(marks, parts, strict=True)),
        )
        if len(sampled):
            frame.num_sampled = len(sampled)
            frame.agreement = torch.zeros(len(ids), 3, device=ids.device)
        return frame

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.kinds)

    @property
    def counts(self) -> RowCounts:
        """Rows by kind."""
        return RowCounts(*np.bincount(self.kinds, minlength=len(RowKind)).tolist())

    @property
    def is_released(self) -> bool:
        """Whether :meth:`release` was called."""
        return "ids" not in vars(self)

    def release(self) -> None:
        """Give the device memory back; counters and what is on the host stay."""
        if not self.is_released:
            del self.ids, self.native_rows, self.native_choice, self.uncounted_rows, self.asked_rows


def _sample(rows: Int64[np.ndarray, " n"], most: int, micro_batch: int) -> Int64[np.ndarray, " m"]:
    """At most ``most`` of ``rows``, drawn anew in each micro-batch, the same in every run."""
    if len(rows) <= most:
        return rows
    # Drawn, since every n-th row of a padded batch may be a row of the same sample.
    return np.sort(np.random.default_rng(micro_batch).choice(rows, most, replace=False))
