"""What a router asks for its experts: megatron-core's ``RouterReplay``, answered from frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.moe_utils import group_limited_topk
from megatron.core.transformer.moe.router_replay import RouterReplay

from megatron_r3 import hand_actions
from megatron_r3.errors import RowCountError
from megatron_r3.metrics import sample_agreement
from megatron_r3.policies import Policies

if TYPE_CHECKING:
    from megatron_r3.frames import Frame
    from megatron_r3.router_calls import ChunkCalls
    from megatron_r3.static_targets import StaticTargets


class ReplayHandle(RouterReplay):
    """The ``router_replay`` of one :class:`~megatron_r3.router.ReplayTopKRouter`.

    Bound to a controller it answers from the frame of the micro-batch that runs. An action set by
    hand (``RouterReplay.set_global_router_replay_action`` and ``set_replay_data``) works as
    upstream's does while no schedule is open, see :mod:`megatron_r3.hand_actions`. Unbound and
    without an action it routes natively. Either way the choice passes through
    ``RouterReplay.get_replay_topk``, so that a wrapper around that method sees it.
    """

    def __init__(self, replaces: RouterReplay | None = None) -> None:
        super().__init__()
        # Upstream registers every instance; ours only takes the place of one that is there.
        instances = RouterReplay.global_router_replay_instances
        instances[:] = [instance for instance in instances if instance is not self]
        _put_in_place_of(replaces, self)
        self.replaces = replaces
        self.layer_number: Any = None
        self.built_in = False
        """Whether the router was built with this handle, so that detaching leaves it."""
        self.fused_config: Any = None
        """The router's own config while it is unfused."""
        self.calls: ChunkCalls | None = None
        self.layer = 0
        self.router: Any = None
        """Weak reference to the router."""
        self.policies = Policies()
        self.static: StaticTargets | None = None
        self.target_replay_mask: torch.Tensor | None = None
        self.replay_backward_mask_list: list[torch.Tensor | None] = []
        self.static_buffer: torch.Tensor | None = None
        self.targets_set = 0
        """Targets set by hand since :meth:`clear_indices`."""
        self.targets_used = 0
        """Forwards that used one of these."""
        self.begin_call()

    def bind(
        self, calls: ChunkCalls, layer: int, policies: Policies, static: StaticTargets | None
    ) -> None:
        """Answer from the frames of ``calls`` or from ``static``, as local router ``layer``."""
        self.calls, self.layer, self.policies, self.static = calls, layer, policies, static

    def unbind(self) -> None:
        """Route natively again."""
        self.calls, self.policies, self.static = None, Policies(), None

    def begin_call(self) -> None:
        """Forget the last call of the router."""
        self.asked = False
        """Whether the router asked for its experts in this call."""
        self.frame: Frame | None = None
        """The frame that answered."""
        self.indices: torch.Tensor | None = None
        """``[T, k]`` int64 ids that the frame answered."""

    def give_place_back(self) -> Any:
        """Leave upstream's global list to the instance that this one replaced, and return it."""
        _put_in_place_of(self, self.replaces)
        return self.replaces

    def set_target_indices(
        self, topk_indices: torch.Tensor, replay_mask: torch.Tensor | None = None
    ) -> None:
        """Set what the next REPLAY_FORWARD uses, and queue it for a REPLAY_BACKWARD.

        Args:
            topk_indices: ``[T, k]`` ids of any integer dtype.
            replay_mask: ``[T]`` bool, False for rows that route natively; ``None`` for none.

        """
        super().set_target_indices(topk_indices)
        self.target_replay_mask = replay_mask
        self.replay_backward_mask_list.append(replay_mask)
        self.targets_set += 1

    def clear_indices(self) -> None:
        """Forget all targets and what was recorded."""
        super().clear_indices()
        self.target_replay_mask, self.replay_backward_mask_list = None, []
        self.targets_set = self.targets_used = 0

    def set_static_buffer(self, buffer: torch.Tensor) -> None:
        """Record into ``buffer``, ``[rows, k]`` with at least T rows, from now on."""
        self.static_buffer = buffer

    def clear_static_buffer(self) -> None:
        """Record by reference again."""
        self.static_buffer = None

    def record_indices(self, topk_indices: torch.Tensor) -> None:
        """Keep what a router chose under RECORD."""
        if self.static_buffer is not None:
            used = self.static_buffer[: len(topk_indices)]
            topk_indices = used.copy_(topk_indices)
        self.recorded_topk_idx = topk_indices

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> Any:
        """Choose the experts of every row.

        Args:
            scores: ``[T, E]`` what the router selects on.
            topk: k.
            num_groups: for group-limited routing.
            group_topk: for group-limited routing.
            default_compute_topk: the router's own choice, ``(scores, topk, num_groups,
                group_topk) -> (values, indices)``.

        Returns:
            ``[T, k]`` scores of the chosen experts, differentiable, and their int64 ids.

        """
        self.asked = True

        def native(scores: torch.Tensor) -> Any:
            if group_topk:
                # The choice handed in is bound to the number of rows of the router's call.
                return group_limited_topk(scores, topk, *scores.shape, num_groups, group_topk)
            return default_compute_topk(scores, topk)

        if self.router_replay_action is not None:
            with hand_actions.resolved(self, scores, topk, native):
                return super().get_replay_topk(
                    scores, topk, num_groups, group_topk, default_compute_topk
                )
        indices, choice = None, default_compute_topk
        if self.static is not None:
            indices = self.static.choose(self.layer, scores, native)
        elif self.calls is not None:
            self.frame, recompute = self.calls.resolve(self.layer)
            if self.frame is not None:
                indices = self._choose(self.frame, recompute, scores, native)
        self.indices = indices
        if indices is not None:

            def choice(*_: Any, **__: Any) -> Any:
                return scores.gather(1, indices), indices

        return super().get_replay_topk(scores, topk, num_groups, group_topk, choice)

    def _choose(
        self, frame: Frame, recompute: bool, scores: torch.Tensor, native: Any
    ) -> torch.Tensor:
        if scores.shape[0] != frame.num_rows:
            raise RowCountError(
                f"the router sees {scores.shape[0]} rows in micro-batch {frame.micro_batch}, "
                f"expected the {frame.num_rows} that feed() was told of: give feed the "
                "seq_length of the padded batch, or a plan."
            )
        # Detached, since the native choice must not save tensors that a recompute does not save.
        ids, scores = frame.ids[self.layer], scores.detach()
        native_rows, asked = frame.native_rows, frame.asked_rows
        own: torch.Tensor
        if native_rows is None and not recompute:
            own = native(scores)[1]
            ids.copy_(own)
            return own
        indices = ids.long()
        if recompute:
            chosen = frame.native_choice[self.layer]
            return indices if chosen is None else indices.index_copy_(0, native_rows, chosen)
        assert native_rows is not None
        assert asked is not None
        if not len(asked):
            return indices
        asked_scores = scores.index_select(0, asked)
        values, own = native(asked_scores)
        count = len(native_rows)
        if count:
            chosen = own if frame.agreement is None else own[:count]
            frame.native_choice[self.layer] = chosen
            indices.index_copy_(0, native_rows, chosen)
        if frame.agreement is not None:
            sample_agreement(
                frame.agreement[self.layer],
                self.router(),
                asked_scores[count:],
                values[count:],
                own[count:],
                indices.index_select(0, asked[count:]),
            )
        return indices

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled model belongs to no controller.
        return (ReplayHandle, ())


def _put_in_place_of(old: RouterReplay | None, new: RouterReplay | None) -> None:
    instances = RouterReplay.global_router_replay_instances
    for index, instance in enumerate(instances):
        if instance is old and new is not None:
            instances[index] = new
