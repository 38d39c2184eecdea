"""Actions that a framework sets by hand on a router's ``RouterReplay``, checked and widened.

Upstream's own code still runs them. Here its enum is known by value (verl has one of its own),
targets may have any integer dtype and a mask of rows (verl's ``replay_mask``), and a target that
upstream would take silently although tokens get no expert from it is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.router_replay import RouterReplayAction

from megatron_r3.errors import InvalidExpertsError, ReplayStateError, RowCountError

if TYPE_CHECKING:
    from megatron_r3.replay_handle import ReplayHandle

NativeChoice = Callable[[torch.Tensor], Any]


@contextlib.contextmanager
def resolved(
    handle: ReplayHandle, scores: torch.Tensor, topk: int, native: NativeChoice
) -> Iterator[None]:
    """Give ``handle`` an action and a target that upstream's ``get_replay_topk`` understands.

    Raises:
        ReplayStateError: a schedule is open, which has its own say.
        RowCountError: no target, or one of another shape than ``[T, k]``.
        InvalidExpertsError: a target that is no integer tensor.

    """
    given, target = handle.router_replay_action, handle.target_topk_idx
    action = RouterReplayAction(given.value)
    if handle.calls is not None and handle.calls.schedule_is_open:
        raise ReplayStateError(
            f"router replay action {given} was set by hand inside an open schedule, expected one "
            "of the two: leave the schedule or drop the action."
        )
    queue, masks = handle.replay_backward_list, handle.replay_backward_mask_list
    handle.router_replay_action = action
    try:
        if action is RouterReplayAction.REPLAY_FORWARD:
            handle.targets_used += 1
            mask = handle.target_replay_mask
            used = _effective(target, mask, action, scores, topk, native)
            handle.target_topk_idx = used
            for number, queued in enumerate(queue if mask is not None else ()):
                if queued is target:
                    # The recompute repeats the choice of the rows that routed natively.
                    queue[number], masks[number] = used, None
        elif action is RouterReplayAction.REPLAY_BACKWARD:
            mask = masks.pop(0) if masks else None
            first = queue[0] if queue else None
            used = _effective(first, mask, action, scores, topk, native)
            queue[0] = used
        yield
    finally:
        handle.router_replay_action, handle.target_topk_idx = given, target


def _effective(
    target: torch.Tensor | None,
    mask: torch.Tensor | None,
    action: RouterReplayAction,
    scores: torch.Tensor,
    topk: int,
    native: NativeChoice,
) -> torch.Tensor:
    expected = (scores.shape[0], topk)
    if target is None or tuple(target.shape) != expected:
        seen = "missing" if target is None else f"of shape {tuple(target.shape)}"
        raise RowCountError(
            f"the replay target of {action} is {seen}, expected {expected}, rows by k: call "
            "set_target_indices once for each forward."
        )
    if target.dtype.is_floating_point or target.dtype == torch.bool:
        raise InvalidExpertsError(
            f"the replay target of {action} has dtype {target.dtype}, expected integers: pass "
            "expert ids."
        )
    indices = target.to(scores.device).long()
    if mask is None:
        return indices
    if tuple(mask.shape) != expected[:1]:
        raise RowCountError(
            f"the replay mask of {action} is of shape {tuple(mask.shape)}, expected "
            f"{expected[:1]}: pass one bool for each row."
        )
    own = native(scores.detach())[1]
    return torch.where(mask.to(scores.device).bool()[:, None], indices, own)
