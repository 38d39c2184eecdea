"""``ReplayTopKRouter``: whatever top-k router a model has, with its choice replayed."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_r3.errors import ReplayStateError
from megatron_r3.policies import PolicyRouter
from megatron_r3.replay_handle import ReplayHandle


class ReplayTopKRouter(PolicyRouter):
    """A top-k router whose ``router_replay`` is a :class:`ReplayHandle`.

    Only the selection is replayed: logits and probabilities are computed live, so the gate stays
    trainable. The class is mixed into the class of the router that is there, see
    :func:`replay_class`; weights, buffers and checkpoint keys stay as they are.
    """

    def routing(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Route as the original class does, and make sure that it asked for its experts.

        Raises:
            ReplayStateError: the router chose by itself although a schedule is open.

        """
        handle = self.router_replay
        handle.begin_call()
        routed = super().routing(logits, *args, **kwargs)
        asked = handle.asked
        handle.begin_call()
        if handle.calls is not None:
            handle.calls.release_spent()
        if not asked and handle.calls is not None and handle.calls.schedule_is_open:
            raise ReplayStateError(
                f"the router of layer {self.layer_number} chose its experts without asking for a "
                "target, expected it to ask in an open schedule: its routing type or a fused "
                "kernel was changed after attach; detach and attach again."
            )
        return routed

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A generated class cannot be found by name: a copied or unpickled router is a stock one.
        make, (_, *rest), *state = super().__reduce_ex__(protocol)
        return (make, (stock_class(type(self)), *rest), *state)


def replay_class(stock: type[TopKRouter]) -> type[ReplayTopKRouter]:
    """The replaying version of a router class, under the same name.

    Weight bridges and FSDP adapters match routers by the exact name of their class.
    """
    if stock not in _REPLAY_CLASSES:
        names = ("__qualname__", "__module__", "__doc__")
        members = {name: getattr(stock, name) for name in names}
        _REPLAY_CLASSES[stock] = type(stock.__name__, (ReplayTopKRouter, stock), members)
    return _REPLAY_CLASSES[stock]


_REPLAY_CLASSES: dict[type, type[ReplayTopKRouter]] = {}


def stock_class(replaying: type[ReplayTopKRouter]) -> type[TopKRouter]:
    """Inverse of :func:`replay_class`."""
    return replaying.__bases__[1]


def make_replaying(router: Any) -> ReplayHandle:
    """Make ``router`` a replaying one, in place, and return its handle."""
    if not isinstance(router, ReplayTopKRouter):
        router.router_replay = ReplayHandle(replaces=router.router_replay)
        router.__class__ = replay_class(type(router))
    router.router_replay.layer_number = router.layer_number
    router.router_replay.router = weakref.ref(router)
    handle: ReplayHandle = router.router_replay
    return handle


def unfuse(router: ReplayTopKRouter) -> None:
    """Let this router alone ask for its target; experts and permutation stay fused."""
    router.router_replay.fused_config = router.config
    router.config = copy.copy(router.config)
    router.config.moe_router_fusion = False


def restore_routers(model: torch.nn.Module) -> None:
    """Undo :func:`make_replaying` in all of ``model``; routers built as replaying ones stay so."""
    for router in model.modules():
        if not isinstance(router, ReplayTopKRouter):
            continue
        handle = router.router_replay
        handle.unbind()
        if handle.fused_config is not None:
            router.config, handle.fused_config = handle.fused_config, None
        if not handle.built_in:
            router.router_replay = handle.give_place_back()
            router.__class__ = stock_class(type(router))
