"""What stands in ``scheduler_config.scheduler_cls``: decides late which scheduler to extend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared_schema import RoutingLayout


@dataclass(frozen=True)
class SchedulerFactory:
    """Called by the engine core in place of a scheduler class.

    Attributes:
        users_class: the user's own scheduler class or its dotted name; ``None`` leaves the choice
            between synchronous and asynchronous to the configuration at the time of the call.
        layout: what the workers capture, once the engine core has asked them.

    """

    users_class: type | str | None = None
    layout: RoutingLayout | None = None

    def __call__(self, *, vllm_config: Any, **kwargs: Any) -> Any:
        """Build the scheduler."""
        from vllm_r3_plugin.scheduler import routing_scheduler

        assert self.layout is not None, "the engine core has not asked its workers"
        base = self.base(vllm_config)
        return routing_scheduler(base, self.layout, vllm_config=vllm_config, **kwargs)

    def base(self, vllm_config: Any) -> Any:
        """The class to extend."""
        from vllm.utils.import_utils import resolve_obj_by_qualname
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        if self.users_class is None:
            return AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
        if isinstance(self.users_class, str):
            return resolve_obj_by_qualname(self.users_class)
        return self.users_class

    def __repr__(self) -> str:
        # vLLM prints this in its warning about custom schedulers.
        users = self.users_class or "vLLM's own, asynchronous scheduling as configured"
        return f"SchedulerFactory of moe-r3 ({users})"

    def __reduce__(self) -> Any:
        """Arriving in another process, install there what engine core and statistics need."""
        return _arrive, (self.users_class, self.layout)


def _arrive(users_class: type | str | None, layout: RoutingLayout | None) -> SchedulerFactory:
    from vllm_r3_plugin import engine_core, metrics

    engine_core.install()
    metrics.install()
    return SchedulerFactory(users_class, layout)
