"""What replay did in one schedule: rows by kind, and how far the router agrees with its routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_r3.groups import Groups, all_reduced
from shared_schema import RoutingLayout

if TYPE_CHECKING:
    from megatron_r3.frames import Frame

_COLUMNS = 8  # four kinds of rows, sampled rows, and the three sums of sample_agreement


@dataclass(frozen=True)
class LayerMetrics:
    """Counters of one layer, or of all of them together, over all ranks.

    Attributes:
        replayed: rows that followed their route.
        unrecorded: rows of tokens without a route.
        padding: rows that are no token.
        recorded: rows whose native choice was recorded.
        sampled: replayed rows that were compared with the router's own choice, up to 128 of each
            micro-batch that ``agreement_every`` names.
        agreement: share of the sampled rows' k slots that the router would have chosen itself.
        probability_mass: mean probability, out of 1 over all experts, that the router gives to a
            sampled row's route.
        first_choice: share of sampled rows whose route has the expert that the router would choose
            first.

    The last three are ``None`` without sampled rows.

    """

    replayed: int
    unrecorded: int
    padding: int
    recorded: int
    sampled: int
    agreement: float | None
    probability_mass: float | None
    first_choice: float | None


@dataclass(frozen=True)
class ReplayMetrics:
    """Metrics of one schedule.

    Attributes:
        layers: of each MoE layer, by its position on the L axis of routes.
        total: of all layers, so rows are counted once for each.

    """

    layers: tuple[LayerMetrics, ...]
    total: LayerMetrics


def sample_agreement(
    agreement: torch.Tensor,
    router: Any,
    scores: torch.Tensor,
    values: torch.Tensor,
    own: torch.Tensor,
    route: torch.Tensor,
) -> None:
    """Add up over M replayed rows how the router would have chosen; nothing leaves the device.

    Args:
        agreement: ``[3]`` float32, written: slots that it would have chosen too, probability of the
            routes, and routes that have its first choice.
        router: the router, for its score function.
        scores: ``[M, E]`` what it selects on.
        values: ``[M, k]`` scores of its own choice.
        own: ``[M, k]`` its own choice.
        route: ``[M, k]`` the choice that is used.

    """
    same = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, route, True).gather(1, own)
    first = same.gather(1, values.argmax(1, keepdim=True))
    mass = _probabilities(router, scores).gather(1, route)
    torch.stack([same.sum(), mass.sum(), first.sum()], out=agreement)


def _probabilities(router: Any, scores: torch.Tensor) -> torch.Tensor:
    """``[T, E]`` of the router over all experts; an expert bias selects but is no probability."""
    if router.score_function == "softmax":
        if router.config.moe_router_pre_softmax:
            return scores
        return torch.softmax(scores, -1, dtype=torch.float32)
    if router.expert_bias is not None:
        scores = scores - router.expert_bias
    return scores / scores.sum(-1, keepdim=True)


def reduced_metrics(
    chunks: Sequence[tuple[Sequence[int], Sequence[Frame]]],
    layout: RoutingLayout,
    groups: Groups,
) -> ReplayMetrics:
    """Add up the frames of every rank; every rank enters, and gets the same.

    Args:
        chunks: for each chunk the L-axis positions of its layers, and its frames.
        layout: the model's.
        groups: of this rank.

    """
    sums = torch.zeros(layout.num_moe_layers, _COLUMNS, dtype=torch.float64)
    for layers, frames in chunks:
        rows = torch.zeros(len(layers), _COLUMNS, dtype=torch.float64)
        for frame in frames:
            counts = frame.counts
            kinds = [counts.replayed, counts.unrecorded, counts.padding, counts.recorded]
            rows[:, :4] += torch.tensor(kinds)
            if frame.agreement is not None:
                rows[:, 4] += frame.num_sampled
                rows[:, 5:] += frame.agreement.cpu()
        sums[list(layers)] += rows
    sums = all_reduced(all_reduced(sums / groups.row_copies, groups.rows), groups.pipeline)
    layer_rows = sums.tolist()
    return ReplayMetrics(
        tuple(_metrics(row, layout.top_k) for row in layer_rows),
        _metrics(sums.sum(0).tolist(), layout.top_k),
    )


def _metrics(row: list[float], top_k: int) -> LayerMetrics:
    replayed, unrecorded, padding, recorded, sampled = (round(count) for count in row[:5])
    same, mass, first = row[5:]
    return LayerMetrics(
        replayed,
        unrecorded,
        padding,
        recorded,
        sampled,
        agreement=same / sampled / top_k if sampled else None,
        probability_mass=mass / sampled if sampled else None,
        first_choice=first / sampled if sampled else None,
    )
