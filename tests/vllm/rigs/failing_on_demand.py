"""Classes for a server's command line, under which the plugin fails while a file says where."""

import os
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.cpu_worker import CPUWorker

from .workers import PipelineWorker

FAULT_FILE = "MOE_R3_TEST_FAULT_FILE"
"""The environment variable that names the file."""


class FaultyWorker(CPUWorker):
    """Its snapshots of the capture buffer fail while the file holds `copy_rows`."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        from vllm_r3_plugin.capturer import RoutingCapturer

        _fail_on_demand(RoutingCapturer, "copy_rows")


class FaultyScheduler(Scheduler):
    """Its store's writes fail while the file holds `write`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from vllm_r3_plugin.page_store import PageStore

        _fail_on_demand(PageStore, "write")


STAGE_FAULTS = ("raises", "sends fewer rows", "is silent", "receives nothing")


class FaultyPipelineWorker(PipelineWorker):
    """Its rows do not arrive at the last stage as they should while the file says how."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        from vllm_r3_plugin import pipeline_rows

        pipeline_rows.PATIENCE_S = 0.5
        send, take = pipeline_rows.StageSender._send, pipeline_rows.StageReceiver.take

        def faulty_send(sender: Any, step: int, finish: Any) -> None:
            fault = _demanded()
            if fault == "raises":
                send(sender, step, _raise)
            elif fault == "sends fewer rows":
                send(sender, step, lambda: finish()[:-1])
            elif fault != "is silent":
                send(sender, step, finish)

        def faulty_take(*args: Any) -> Any:
            return _raise() if _demanded() == "receives nothing" else take(*args)

        pipeline_rows.StageSender._send = faulty_send  # type: ignore[method-assign]
        pipeline_rows.StageReceiver.take = faulty_take  # type: ignore[method-assign]


def _raise() -> Any:
    raise RuntimeError("fails on demand")


def _demanded() -> str:
    file = Path(os.environ[FAULT_FILE])
    return file.read_text() if file.exists() else ""


def _fail_on_demand(cls: type, name: str) -> None:
    function = getattr(cls, name)

    def fails_on_demand(*args: Any, **kwargs: Any) -> Any:
        return _raise() if _demanded() == name else function(*args, **kwargs)

    setattr(cls, name, fails_on_demand)
