"""The routes of one micro-batch in one model chunk, as its routers use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from megatron_r3.groups import Groups
from megatron_r3.layout_plan import NO_ROW, PADDING, LayoutPlan, scatter
from megatron_r3.policies import Policies, spread_experts
from shared_schema import RoutedExpertsBatch, RoutingLayout


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
        ids: ``[L_local, T, k]`` on the routers' device, in the layout's narrow dtype. A router
            writes its own choice into the native rows, so that a recompute repeats it.
        kinds: ``[T]`` a :class:`RowKind` for each row, on the host.
        native_rows: ``[N]`` int64 on the device, the rows that route natively; ``None`` where all
            do (recording).
        uncounted_rows: ``[N]`` int64 on the device, the rows that the expert bias leaves out;
            ``None`` where it counts all.
        plan: what each row is.
        micro_batch: its number in the schedule, for messages.
        agreement: ``[L_local, 3]`` float64 sums over replayed rows, see
            :func:`~megatron_r3.metrics.sample_agreement`; ``None`` where this micro-batch is not
            sampled.
        replayed: ``[T]`` bool on the device, True for replayed rows; only where sampled.
        forwards: how often each local router used it in a forward.
        recomputes: how often each local router used it in a recompute.

    """

    ids: torch.Tensor
    kinds: UInt8[np.ndarray, " T"]
    native_rows: torch.Tensor | None
    plan: LayoutPlan
    micro_batch: int
    uncounted_rows: torch.Tensor | None = None
    agreement: torch.Tensor | None = None
    replayed: torch.Tensor | None = None
    forwards: list[int] = field(init=False)
    recomputes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.forwards = [0] * len(self.ids)
        self.recomputes = [0] * len(self.ids)

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
        dtype = torch.from_numpy(np.empty(0, layout.dtype)).dtype
        return cls(
            ids=torch.empty((len(layers), plan.num_rows, layout.top_k), dtype=dtype, device=device),
            kinds=np.where(plan.is_padding, RowKind.PADDING, RowKind.RECORDED).astype(np.uint8),
            native_rows=None,
            plan=plan,
            micro_batch=micro_batch,
        )

    @classmethod
    def to_replay(
        cls,
        routes: RoutedExpertsBatch,
        plan: LayoutPlan,
        layers: Sequence[int],
        micro_batch: int,
        device: torch.device,
        sample_agreement: bool,
        policies: Policies,
        groups: Groups,
    ) -> Frame:
        """Bring validated routes into the routers' order and onto their device.

        Args:
            routes: the samples of the micro-batch.
            plan: what each local row is.
            layers: index in the layout's MoE layers of each local router.
            micro_batch: its number in the schedule.
            device: the routers' device.
            sample_agreement: whether to compare with the routers' own choice.
            policies: for padding and for the expert bias.
            groups: over whose expert-parallel ranks padding is spread.

        """
        assert routes.token_starts is not None  # filled in by the schema
        source = plan.source_rows(routes.token_starts, routes.lengths)
        kinds = np.zeros(len(source), np.uint8)
        kinds[source == NO_ROW] = RowKind.UNRECORDED
        kinds[source == PADDING] = RowKind.PADDING
        held = np.flatnonzero(source >= 0)
        kinds[held[~routes.recorded[source[held]]]] = RowKind.UNRECORDED
        ids = scatter(routes.values, source, layers, routes.layout.fill_id)
        native = kinds != RowKind.REPLAYED
        if policies.padding == "spread":
            padding = np.flatnonzero(kinds == RowKind.PADDING)
            ids[:, padding] = spread_experts(
                len(padding),
                layers,
                routes.layout.num_experts,
                routes.layout.top_k,
                groups.ep_size,
                groups.ep_rank,
            )
            native[padding] = False
        frame = cls(
            ids=_to_device(ids, device),
            kinds=kinds,
            native_rows=_to_device(np.flatnonzero(native), device),
            plan=plan,
            micro_batch=micro_batch,
        )
        frame._follow(policies, sample_agreement)
        return frame

    @classmethod
    def to_repeat(
        cls, recorded: Frame, micro_batch: int, sample_agreement: bool, policies: Policies
    ) -> Frame:
        """Replay a recorded micro-batch, padding too, from the ids that are on the device."""
        padding = recorded.kinds == RowKind.PADDING
        frame = cls(
            ids=recorded.ids,
            kinds=np.where(padding, RowKind.PADDING, RowKind.REPLAYED).astype(np.uint8),
            native_rows=torch.empty(0, dtype=torch.int64, device=recorded.ids.device),
            plan=recorded.plan,
            micro_batch=micro_batch,
        )
        frame._follow(policies, sample_agreement)
        return frame

    def _follow(self, policies: Policies, sample_agreement: bool) -> None:
        device = self.ids.device
        replayed = self.kinds == RowKind.REPLAYED
        if policies.bias_counts != "all":
            left_out = self.kinds == RowKind.PADDING
            if policies.bias_counts == "replayed":
                left_out = ~replayed
            self.uncounted_rows = _to_device(np.flatnonzero(left_out), device)
        if sample_agreement:
            self.replayed = _to_device(replayed, device)
            self.agreement = torch.zeros(len(self.ids), 3, dtype=torch.float64, device=device)

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.kinds)

    @property
    def counts(self) -> RowCounts:
        """Rows by kind."""
        return RowCounts(*np.bincount(self.kinds, minlength=len(RowKind)).tolist())

    def release(self) -> None:
        """Give the device memory back; what is on the host stays."""
        del self.ids, self.native_rows


def _to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
