"""Routes that no router would choose, and a witness of what every router really used.

Each row's experts are drawn from (sample, position, layer) alone, so a row that lands anywhere
else, in another sample, position, layer or micro-batch, is seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared_schema import RoutedExperts, RoutedExpertsBatch, RoutingLayout


def foreign_experts(layout: RoutingLayout, sample: int, position: int, layer: int) -> np.ndarray:
    """``[k]`` distinct ids in an order of their own."""
    draw = np.random.default_rng((sample, position, layer))
    return draw.permutation(layout.num_experts)[: layout.top_k]


def foreign_routes(
    layout: RoutingLayout,
    lengths: Sequence[int],
    first_sample: int = 0,
    unrecorded: Sequence[tuple[int, int]] = (),
) -> RoutedExpertsBatch:
    """Routes of one micro-batch, one row less than tokens; ``unrecorded`` (sample, position)s."""
    samples = []
    for number, length in enumerate(lengths):
        rows = max(length - 1, 0)
        ids = np.zeros((rows, layout.num_moe_layers, layout.top_k), layout.dtype)
        for position, layer in np.ndindex(ids.shape[:2]):
            ids[position, layer] = foreign_experts(layout, first_sample + number, position, layer)
        status = np.array([3 * ((number, p) in unrecorded) for p in range(rows)], np.uint8)
        samples.append(RoutedExperts(ids, layout, status=status))
    return RoutedExpertsBatch.from_list(samples)


@dataclass
class RouterWitness:
    """Hooks on the routers' outputs that note which experts each call really used.

    Attributes:
        forwards: by (micro-batch, layer on the L axis) the ``[T, E]`` map of experts with a
            probability, as the dispatcher gets it.
        recomputes: the same of calls within a backward pass.
        micro_batch: set by the test to the one that runs.
        count_recomputes: number recomputes of each layer one after the other instead.

    """

    forwards: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    recomputes: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    micro_batch: int = -1
    count_recomputes: bool = False
    routers: list[Any] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    def watch(self, model: Any) -> "RouterWitness":
        from megatron.core.transformer.moe.router import TopKRouter

        self.routers = [m for m in model.modules() if isinstance(m, TopKRouter)]
        for layer, router in enumerate(self.routers):
            self.hooks.append(
                router.register_forward_hook(
                    lambda _, __, output, layer=layer: self._note(layer, *output)
                )
            )
        return self

    def leave(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _note(self, layer: int, probs: Tensor, routing_map: Tensor) -> None:
        assert torch.equal(probs.detach() != 0, routing_map)
        in_backward = torch._C._current_graph_task_id() != -1
        calls = self.recomputes if in_backward else self.forwards
        micro_batch = self.micro_batch
        if in_backward and self.count_recomputes:
            micro_batch = sum(1 for _, seen in calls if seen == layer)
        assert (micro_batch, layer) not in calls
        calls[micro_batch, layer] = routing_map.detach().clone()


def expected_map(
    layout: RoutingLayout, cells: Sequence[tuple[int, int] | None], layer: int
) -> tuple[Tensor, Tensor]:
    """``[T, E]`` map of the foreign route and ``[T]`` which rows it says something about.

    ``cells`` holds (sample, position) of each router row that was replayed, else ``None``.
    """
    used = torch.zeros(len(cells), layout.num_experts, dtype=torch.bool)
    for row, cell in enumerate(cells):
        if cell is not None:
            used[row, torch.from_numpy(foreign_experts(layout, *cell, layer).astype(np.int64))] = (
                True
            )
    return used, torch.tensor([cell is not None for cell in cells])
