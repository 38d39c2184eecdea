"""What a router asks for its experts: megatron-core's ``RouterReplay``, answered from frames."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from megatron_r3.errors import ReplayStateError, RowCountError

if TYPE_CHECKING:
    from megatron_r3.frames import Frame
    from megatron_r3.router_calls import ChunkCalls


class ReplayHandle(RouterReplay):
    """The ``router_replay`` of one :class:`~megatron_r3.router.ReplayTopKRouter`.

    Bound to a controller it answers from the frame of the micro-batch that runs. An action set by
    hand (``RouterReplay.set_global_router_replay_action`` and ``set_replay_data``) works as
    upstream's does while no schedule is open. Unbound and without an action it routes natively.
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
        self.asked = False
        """Whether the router asked for its experts since somebody reset this."""

    def bind(self, calls: ChunkCalls, layer: int) -> None:
        """Answer from the frames of ``calls``, as its local router ``layer``."""
        self.calls, self.layer = calls, layer

    def unbind(self) -> None:
        """Route natively again."""
        self.calls = None

    def give_place_back(self) -> Any:
        """Leave upstream's global list to the instance that this one replaced, and return it."""
        _put_in_place_of(self, self.replaces)
        return self.replaces

    def set_router_replay_action(self, router_replay_action: RouterReplayAction) -> None:
        """As upstream's; takes the actions of other enums with the same values too."""
        super().set_router_replay_action(RouterReplayAction(router_replay_action.value))

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
        if self.router_replay_action is not None:
            self._check_action_by_hand(scores, topk)
            return super().get_replay_topk(
                scores, topk, num_groups, group_topk, default_compute_topk
            )
        frame, recompute = (None, False) if self.calls is None else self.calls.resolve(self.layer)
        if frame is None:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if scores.shape[0] != frame.num_rows:
            raise RowCountError(
                f"the router sees {scores.shape[0]} rows in micro-batch {frame.micro_batch}, "
                f"expected the {frame.num_rows} that feed() was told of: give feed the "
                "seq_length of the padded batch, or a plan."
            )

        # Detached, since the native choice must not save tensors that a recompute does not save.
        own_choice = partial(_indices, default_compute_topk, topk, num_groups, group_topk)
        detached = scores.detach()
        if recompute:
            indices = frame.ids[self.layer].long()
        elif frame.native_rows is None:
            indices = own_choice(detached)
            frame.ids[self.layer].copy_(indices)
        else:
            indices = self._replayed(frame, detached, own_choice, bool(group_topk))
        return scores.gather(1, indices), indices

    def _replayed(
        self, frame: Frame, scores: torch.Tensor, own_choice: Any, grouped: bool
    ) -> torch.Tensor:
        indices = frame.ids[self.layer].long()
        rows = frame.native_rows
        assert rows is not None
        if frame.agreement is not None:
            native = own_choice(scores)
            same = (native[:, :, None] == indices[:, None, :]).any(1).sum(1)
            same[rows] = 0
            frame.agreement[self.layer] = same.sum()
            chosen = native[rows]
        elif not len(rows):
            return indices
        elif grouped:
            # The group-limited choice is bound to the number of rows of the router's call.
            chosen = own_choice(scores)[rows]
        else:
            chosen = own_choice(scores[rows])
        indices[rows] = chosen
        # The whole layer, since torch cannot copy by index into uint16.
        frame.ids[self.layer].copy_(indices)
        return indices

    def _check_action_by_hand(self, scores: torch.Tensor, topk: int) -> None:
        """Upstream takes wrong targets silently: tokens beyond a short target get no expert."""
        if self.calls is not None and self.calls.schedule_is_open:
            raise ReplayStateError(
                f"router replay action {self.router_replay_action} was set by hand inside an open "
                "schedule, expected one of the two: leave the schedule or drop the action."
            )
        if self.router_replay_action == RouterReplayAction.REPLAY_FORWARD:
            target = self.target_topk_idx
        elif self.router_replay_action == RouterReplayAction.REPLAY_BACKWARD:
            target = self.replay_backward_list[0] if self.replay_backward_list else None
        else:
            return
        expected = (scores.shape[0], topk)
        if target is None or tuple(target.shape) != expected:
            seen = "missing" if target is None else f"of shape {tuple(target.shape)}"
            raise RowCountError(
                f"the replay target of {self.router_replay_action} is {seen}, expected "
                f"{expected}, rows by k: call set_target_indices once for each forward."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or unpickled model belongs to no controller.
        return (ReplayHandle, ())


def _indices(
    compute_topk: Any,
    topk: int,
    num_groups: int | None,
    group_topk: int | None,
    scores: torch.Tensor,
) -> torch.Tensor:
    indices: torch.Tensor = compute_topk(
        scores, topk, num_groups=num_groups, group_topk=group_topk
    )[1]
    return indices


def _put_in_place_of(old: RouterReplay | None, new: RouterReplay | None) -> None:
    instances = RouterReplay.global_router_replay_instances
    for index, instance in enumerate(instances):
        if instance is old and new is not None:
            instances[index] = new
