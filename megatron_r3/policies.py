"""What replay means for padding, the auxiliary loss, the expert bias and the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int64
from megatron.core.transformer.moe.router import TopKRouter

from megatron_r3.errors import ReplayStateError

if TYPE_CHECKING:
    from megatron_r3.replay_handle import ReplayHandle

Padding = Literal["native", "spread"]
AuxLoss = Literal["live", "replayed", "off"]
BiasCounts = Literal["all", "tokens", "replayed"]


@dataclass(frozen=True)
class Policies:
    """The keyword arguments of ``attach`` that say what a replayed micro-batch means.

    Attributes:
        padding: of ``attach``.
        aux_loss: of ``attach``.
        bias_counts: of ``attach``.

    Raises:
        ReplayStateError: a value that is none of the names.

    """

    padding: Padding = "native"
    aux_loss: AuxLoss = "live"
    bias_counts: BiasCounts = "all"

    def __post_init__(self) -> None:
        for name, names in (
            ("padding", get_args(Padding)),
            ("aux_loss", get_args(AuxLoss)),
            ("bias_counts", get_args(BiasCounts)),
        ):
            if getattr(self, name) not in names:
                raise ReplayStateError(
                    f"{name} is {getattr(self, name)!r}, expected one of {list(names)}: name one."
                )


def spread_experts(
    num_rows: int,
    layers: Sequence[int],
    num_experts: int,
    top_k: int,
    ep_size: int = 1,
    ep_rank: int = 0,
) -> Int64[np.ndarray, "L_local rows k"]:
    """Experts for padding rows, so that no expert and no rank gets them all.

    One expert of each expert-parallel rank after the other, k distinct ones in each row; every
    layer and every rank that sends begins at another one.

    Args:
        num_rows: padding rows of this rank.
        layers: position on the L axis of each local router.
        num_experts: E; each rank holds E / ``ep_size`` consecutive ones.
        top_k: k.
        ep_size: expert-parallel ranks.
        ep_rank: this rank among them.

    """
    begin = (np.asarray(layers, np.int64) + ep_rank) * top_k
    slot = np.arange(num_rows * top_k).reshape(num_rows, top_k)
    turn = (begin[:, None, None] + slot) % num_experts
    experts: np.ndarray[Any, Any] = turn % ep_size * (num_experts // ep_size) + turn // ep_size
    return experts


class PolicyRouter(TopKRouter):
    """The policies, in the methods of a top-k router that they concern.

    They hold for calls that a frame of ``schedule("replay")`` answered, and for no others.
    """

    router_replay: ReplayHandle

    def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Route, and keep replayed experts from vanishing in the dispatcher."""
        probs, routing_map = super().routing(logits, *args, **kwargs)
        follows = self._replays() or self.router_replay.static is not None
        if follows and _selects_again(self.config):
            # A replayed expert whose probability underflows to 0 would lose its place.
            floor = torch.finfo(probs.dtype).tiny
            probs = probs.masked_fill(routing_map & (probs == 0), floor)
        return probs, routing_map

    def is_aux_loss_enabled(self) -> bool:
        """As configured, unless the policy is off."""
        off = self._replays() and self.router_replay.policies.aux_loss == "off"
        return not off and super().is_aux_loss_enabled()

    def _apply_aux_loss(
        self, probs: Any, scores: Any, routing_map: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return super()._apply_aux_loss(probs, scores, self._counted(routing_map), *args, **kwargs)

    def _apply_seq_aux_loss(
        self, probs: Any, scores: Any, routing_map: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return super()._apply_seq_aux_loss(
            probs, scores, self._counted(routing_map), *args, **kwargs
        )

    def _apply_global_aux_loss(
        self, probs: Any, scores: Any, routing_map: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return super()._apply_global_aux_loss(
            probs, scores, self._counted(routing_map), *args, **kwargs
        )

    def _apply_expert_bias(
        self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> Any:
        frame = self.router_replay.frame
        if self.enable_expert_bias and torch.is_grad_enabled():
            if frame is not None and frame.uncounted_rows is not None:
                routing_map = routing_map.index_fill(0, frame.uncounted_rows, False)
            if padding_mask is not None:
                # Releases up to 0.19.2 combine [T, E] with [T], which fails.
                routing_map = routing_map & ~padding_mask.reshape(-1, 1)
        return super()._apply_expert_bias(routing_map)

    def _replays(self) -> bool:
        frame = self.router_replay.frame
        return frame is not None and frame.native_rows is not None

    def _counted(self, live: torch.Tensor) -> torch.Tensor:
        """``[T, E]`` what the auxiliary loss counts; rows that ``live`` leaves out stay out."""
        indices = self.router_replay.indices
        if not self._replays() or self.router_replay.policies.aux_loss != "replayed":
            return live
        assert indices is not None
        return torch.zeros_like(live).scatter(1, indices, True) & live.any(1, keepdim=True)


def _selects_again(config: Any) -> bool:
    """Whether the dispatcher reads the experts from a top-k of the probabilities."""
    backend = getattr(config, "moe_flex_dispatcher_backend", None)
    return config.moe_token_dispatcher_type == "flex" and backend != "hybridep"
