"""Compiled engines: one without the flag, then one with it on the same compile cache.

The order matters: a graph that was compiled and cached without capture must not serve capture.
"""

from pathlib import Path
from typing import Any

import pytest

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout
from .rigs.tiny_layouts import LAYOUTS, make_layout
from .rigs.transformers_oracle import TransformersOracle

# Every layer takes seconds to compile: the model has two.
LAYOUT = LAYOUTS["300 experts"]


def _run_without_flag(model: Path) -> dict[str, Any]:
    llm = start_engine(model, enforce_eager=False, enable_return_routed_experts=False)
    config = llm.llm_engine.vllm_config
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    routers = [
        module.router
        for module in worker.model_runner.get_model().modules()
        if hasattr(module, "router")
    ]
    return {
        "rollouts": generate(llm, *workload(8, seed=6)),
        "classes": [
            config.parallel_config.worker_cls,
            *(f"{type(o).__module__}.{type(o).__qualname__}" for o in (worker, core.scheduler)),
        ],
        "additional_config": config.additional_config,
        "captured": [router.capture_fn is not None for router in routers],
    }


def _run_with_flag(model: Path) -> list[Rollout]:
    rollouts = generate(start_engine(model, enforce_eager=False), *workload(60, seed=7))
    for rollout in rollouts:
        rollout.shape = LAYOUT.shape
    return rollouts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_layout(LAYOUT, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def without_flag(model: Path, compile_cache: dict[str, str]) -> dict[str, Any]:
    return run_in_engine_process(_run_without_flag, model, env=compile_cache)


@pytest.fixture(scope="module")
def with_flag(
    model: Path, compile_cache: dict[str, str], without_flag: dict[str, Any]
) -> list[Rollout]:
    return run_in_engine_process(_run_with_flag, model, env=compile_cache, in_process_core=False)


def test_without_the_flag_no_class_is_replaced_and_nothing_is_captured(
    without_flag: dict[str, Any],
) -> None:
    assert without_flag["classes"] == [
        "vllm.v1.worker.cpu_worker.CPUWorker",
        "vllm.v1.worker.cpu_worker.CPUWorker",
        "vllm.v1.core.sched.scheduler.Scheduler",
    ]
    assert without_flag["additional_config"] == {}
    assert without_flag["captured"] == [False] * 2
    assert all(rollout.routed is None for rollout in without_flag["rollouts"])


def test_compiled_engine_returns_the_rows_of_transformers(
    with_flag: list[Rollout], model: Path
) -> None:
    agreement = TransformersOracle(model).agreement(with_flag)
    assert agreement.decisions > 4000
    assert agreement.differing == 0
