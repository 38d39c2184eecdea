"""Tensor and pipeline parallelism: one engine over two worker processes."""

from pathlib import Path
from typing import Any

import pytest

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout
from .rigs.transformers_oracle import TransformersOracle

MODES: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tensor_parallel_size": 2},
    "pipeline parallel": {
        "pipeline_parallel_size": 2,
        "worker_cls": "tests.vllm.rigs.workers.PipelineWorker",
    },
}


def _run(model: Path, mode: dict[str, Any]) -> list[Rollout]:
    return generate(start_engine(model, **mode), *workload(60, seed=8))


@pytest.fixture(scope="module", params=MODES.values(), ids=list(MODES))
def rollouts(request: pytest.FixtureRequest, moe_model: Path) -> list[Rollout]:
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    return run_in_engine_process(_run, moe_model, request.param, in_process_core=False, env=env)


def test_rows_are_those_of_transformers(
    rollouts: list[Rollout], oracle: TransformersOracle
) -> None:
    agreement = oracle.agreement(rollouts)
    assert agreement.decisions > 10_000
    assert agreement.differing == 0
