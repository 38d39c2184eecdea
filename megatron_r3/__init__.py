"""Routing replay in Megatron: the trainer's routers choose the experts that the rollout chose.

A training step with it::

    ctl = megatron_r3.attach(model_chunks)
    with ctl.schedule("replay"):
        forward_backward_func(...)

and in ``forward_step``, before the model::

    ctl.feed(chunk, routes, packed_seq_params=psp, host_lengths=lengths)

Importing this package imports neither torch nor Megatron; what needs them comes with its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_r3 import compat as compat
    from megatron_r3.attach_report import AttachedRouter as AttachedRouter
    from megatron_r3.attach_report import AttachReport as AttachReport
    from megatron_r3.attachment import attach as attach
    from megatron_r3.attachment import detach as detach
    from megatron_r3.attachment import install as install
    from megatron_r3.attachment import uninstall as uninstall
    from megatron_r3.controller import Controller as Controller
    from megatron_r3.errors import InvalidExpertsError as InvalidExpertsError
    from megatron_r3.errors import InvalidRoutesError as InvalidRoutesError
    from megatron_r3.errors import LayoutMismatchError as LayoutMismatchError
    from megatron_r3.errors import ReplayStateError as ReplayStateError
    from megatron_r3.errors import RoutingReplayError as RoutingReplayError
    from megatron_r3.errors import RowCountError as RowCountError
    from megatron_r3.errors import UnsupportedRouterError as UnsupportedRouterError
    from megatron_r3.frames import RowCounts as RowCounts
    from megatron_r3.layout_plan import LayoutPlan as LayoutPlan
    from megatron_r3.layout_plan import Shard as Shard
    from megatron_r3.layout_plan import aligned_lengths as aligned_lengths
    from megatron_r3.layout_plan import token_identities as token_identities
    from megatron_r3.metrics import LayerMetrics as LayerMetrics
    from megatron_r3.metrics import ReplayMetrics as ReplayMetrics
    from megatron_r3.router import ReplayTopKRouter as ReplayTopKRouter
    from megatron_r3.schedule import Schedule as Schedule
    from megatron_r3.schedule import ScheduleReport as ScheduleReport

_HOMES = {
    "attach_report": ("AttachReport", "AttachedRouter"),
    "attachment": ("attach", "detach", "install", "uninstall"),
    "controller": ("Controller",),
    "errors": (
        "InvalidExpertsError",
        "InvalidRoutesError",
        "LayoutMismatchError",
        "ReplayStateError",
        "RoutingReplayError",
        "RowCountError",
        "UnsupportedRouterError",
    ),
    "frames": ("RowCounts",),
    "layout_plan": ("LayoutPlan", "Shard", "aligned_lengths", "token_identities"),
    "metrics": ("LayerMetrics", "ReplayMetrics"),
    "router": ("ReplayTopKRouter",),
    "schedule": ("Schedule", "ScheduleReport"),
}

__all__ = [
    "AttachReport",
    "AttachedRouter",
    "Controller",
    "InvalidExpertsError",
    "InvalidRoutesError",
    "LayerMetrics",
    "LayoutMismatchError",
    "LayoutPlan",
    "ReplayMetrics",
    "ReplayStateError",
    "ReplayTopKRouter",
    "RoutingReplayError",
    "RowCountError",
    "RowCounts",
    "Schedule",
    "ScheduleReport",
    "Shard",
    "UnsupportedRouterError",
    "aligned_lengths",
    "attach",
    "compat",
    "detach",
    "install",
    "token_identities",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name == "compat":
        return import_module(f"{__name__}.compat")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
