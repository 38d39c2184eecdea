"""Tensor and pipeline parallelism: one engine over two worker processes."""

import os
from pathlib import Path
from typing import Any

import pytest

from .rigs.engine import ALL_MODES, generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.failing_on_demand import FAULT_FILE, STAGE_FAULTS
from .rigs.rollouts import Rollout
from .rigs.transformers_oracle import TransformersOracle

MODES: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tensor_parallel_size": 2},
    "pipeline parallel": {
        "pipeline_parallel_size": 2,
        "worker_cls": "tests.vllm.rigs.failing_on_demand.FaultyPipelineWorker",
    },
}
if ALL_MODES:
    MODES["expert parallel"] = {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "worker_cls": "tests.vllm.rigs.workers.ExpertParallelWorker",
    }


def _run(model: Path, mode: dict[str, Any]) -> dict[str, list[Rollout]]:
    llm = start_engine(model, **mode)
    found = {"": generate(llm, *workload(60, seed=8))}
    if "pipeline_parallel_size" in mode:
        for fault in STAGE_FAULTS:
            Path(os.environ[FAULT_FILE]).write_text(fault)
            found[fault] = generate(llm, *workload(4, seed=9, max_tokens=5))
        Path(os.environ[FAULT_FILE]).unlink()
        generate(llm, *workload(1, seed=10))  # what was late arrives
        found["afterwards"] = generate(llm, *workload(20, seed=11))
    return found


@pytest.fixture(scope="module", params=MODES.values(), ids=list(MODES))
def groups(
    request: pytest.FixtureRequest, moe_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Rollout]]:
    fault_file = tmp_path_factory.mktemp("fault") / "fault"
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", FAULT_FILE: str(fault_file)}
    return run_in_engine_process(_run, moe_model, request.param, in_process_core=False, env=env)


def test_rows_are_those_of_transformers(
    groups: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    agreement = oracle.agreement(groups[""])
    assert agreement.decisions > 10_000
    assert agreement.differing == 0


def test_a_stage_whose_rows_do_not_arrive_costs_arrays_until_they_do(
    groups: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    if len(groups) == 1:
        pytest.skip("one stage")
    for fault in STAGE_FAULTS:
        assert [rollout.routed for rollout in groups[fault]] == [None] * 4
    assert oracle.agreement(groups["afterwards"]).differing == 0
