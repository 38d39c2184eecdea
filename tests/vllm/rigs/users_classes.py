"""What users bring along: classes of their own, and other plugins, some of them broken."""

import sys
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.cpu_worker import CPUWorker


class UsersWorker(CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.users_loads = 1


class UsersExtension:
    def moe_layers_seen(self) -> dict[str, Any]:
        """A method that `collective_rpc` calls."""
        worker: Any = self
        return {
            "classes": [base.__name__ for base in type(worker).__mro__],
            "loads": worker.users_loads,
        }


class _CountsSteps:
    users_steps = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.users_steps += 1
        return super().schedule(*args, **kwargs)  # type: ignore[misc]


class UsersScheduler(_CountsSteps, Scheduler):
    pass


class UsersAsyncScheduler(_CountsSteps, AsyncScheduler):
    pass


def other_plugin() -> list[bool]:
    """Wrap `create_engine_config`; returns whether each call saw the flag that the user gave."""
    from vllm.engine.arg_utils import EngineArgs

    create, seen = EngineArgs.create_engine_config, []

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.enable_return_routed_experts)
        config = create(self, *args, **kwargs)
        config.additional_config["other"] = len(seen)
        return config

    EngineArgs.create_engine_config = create_engine_config
    return seen


def raises_in_register() -> None:
    """The entry point of a plugin that cannot do its work."""
    raise RuntimeError("the users' plugin is broken")


def install_plugin(folder: Path, name: str, entry_point: str) -> None:
    """Let `entry_point` be found as a plugin of vLLM's, behind those that are installed."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {entry_point}\n")
    sys.path.append(str(folder))
