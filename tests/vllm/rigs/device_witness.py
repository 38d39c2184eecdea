"""A second record of every step's routing on the device itself, inside CUDA graphs too.

It shares only the router's output with the capture: ids are written as the router computed them,
in 64 bits, one buffer for each layer, and set aside on the device after each forward. Named on the
command line as a user names his own worker class, for the platform's worker.
"""

from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform

if current_platform.is_cuda():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker


class WitnessWorker(PlatformWorker):  # type: ignore[misc,valid-type]
    """The platform's worker with a witness at each router."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.witness = Witness(self.model_runner)


class Witness:
    """Attributes: `steps`, the ids [N, L_moe, k] of each step that was run for requests."""

    def __init__(self, runner: Any) -> None:
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

        found = (getattr(module, "router", None) for module in runner.get_model().modules())
        routers = list(dict.fromkeys(router for router in found if isinstance(router, BaseRouter)))
        shape = (runner.max_num_tokens, routers[0].top_k)
        self._buffers = [
            torch.full(shape, -1, dtype=torch.int64, device=runner.device) for _ in routers
        ]
        self._steps: list[list[torch.Tensor]] = []
        for router, buffer in zip(routers, self._buffers, strict=True):
            _witness(router, buffer)
        execute = runner.execute_model

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            result = execute(scheduler_output, *args, **kwargs)
            num_tokens = scheduler_output.total_num_scheduled_tokens
            if num_tokens:
                self._steps.append([buffer[:num_tokens].clone() for buffer in self._buffers])
            return result

        runner.execute_model = execute_model

    @property
    def steps(self) -> list[np.ndarray]:
        return [torch.stack(step, dim=1).cpu().numpy() for step in self._steps]


def _witness(router: Any, buffer: torch.Tensor) -> None:
    compute = router._compute_routing

    def compute_routing(*args: Any, **kwargs: Any) -> Any:
        weights, ids = compute(*args, **kwargs)
        buffer[: ids.shape[0]] = ids
        return weights, ids

    router._compute_routing = compute_routing
