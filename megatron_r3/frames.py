"""The routes of one micro-batch in one model chunk, as its routers use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt, UInt8

from megatron_r3.layout_plan import NO_ROW, PADDING, LayoutPlan, scatter
from shared_schema import RoutedExpertsBatch, RoutingLayout


class RowKind(IntEnum):
    """What happens to a row."""

    REPLAYED = 0
    UNRECORDED = 1
    """A token that routes natively: the routes mark it so, or have no row for it."""
    PADDING = 2
    """No token; routes natively too."""
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
        plan: what each row is.
        micro_batch: its number in the schedule, for messages.
        agreement: ``[L_local]`` slots of replayed rows that the router would have chosen itself;
            ``None`` where this micro-batch is not sampled.
        forwards: how often each local router used it in a forward.
        recomputes: how often each local router used it in a recompute.

    """

    ids: torch.Tensor
    kinds: UInt8[np.ndarray, " T"]
    native_rows: torch.Tensor | None
    plan: LayoutPlan
    micro_batch: int
    agreement: torch.Tensor | None = None
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
    ) -> Frame:
        """Bring validated routes into the routers' order and onto their device.

        Args:
            routes: the samples of the micro-batch.
            plan: what each local row is.
            layers: index in the layout's MoE layers of each local router.
            micro_batch: its number in the schedule.
            device: the routers' device.
            sample_agreement: whether to compare with the routers' own choice.

        """
        assert routes.token_starts is not None  # filled in by the schema
        source = plan.source_rows(routes.token_starts, routes.lengths)
        kinds = np.zeros(len(source), np.uint8)
        kinds[source == NO_ROW] = RowKind.UNRECORDED
        kinds[source == PADDING] = RowKind.PADDING
        held = np.flatnonzero(source >= 0)
        kinds[held[~routes.recorded[source[held]]]] = RowKind.UNRECORDED
        agreement = torch.zeros(len(layers), dtype=torch.int64, device=device)
        return cls(
            ids=_to_device(scatter(routes.values, source, layers, routes.layout.fill_id), device),
            kinds=kinds,
            native_rows=_to_device(np.flatnonzero(kinds), device),
            plan=plan,
            micro_batch=micro_batch,
            agreement=agreement if sample_agreement else None,
        )

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.kinds)

    @property
    def counts(self) -> RowCounts:
        """Rows by kind."""
        return RowCounts(*np.bincount(self.kinds, minlength=len(RowKind)).tolist())

    def recorded_rows(self, fill: int) -> UInt[np.ndarray, "tokens L_local k"]:
        """What the routers chose, in the order of the samples' tokens, on the host."""
        return self.plan.gather(self.ids.cpu().numpy(), fill)

    def release(self) -> None:
        """Give the device memory back; what is on the host stays."""
        del self.ids, self.native_rows


def _to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
