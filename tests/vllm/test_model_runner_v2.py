"""Model Runner V2, in Triton's interpreter, where vLLM's own path runs too: array by array."""

import types
from pathlib import Path

import numpy as np
import pytest

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout
from .rigs.transformers_oracle import TransformersOracle

V2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def _run(model: Path, backend: str) -> tuple[list[str], list[Rollout]]:
    import triton.backends

    # Triton looks for an active driver before it interprets.
    driver = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
    llm = start_engine(
        model, num_gpu_blocks_override=24, additional_config={"r3": {"backend": backend}}
    )
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    prompts, params = workload(24, seed=10, max_tokens=12)
    for param in params:
        param.temperature = 0.0
    parts = (worker.model_runner, worker, core.scheduler)
    bases = [base.__module__ for part in parts for base in type(part).__mro__]
    return bases, generate(llm, prompts, params)


@pytest.fixture(scope="module")
def ours(moe_model: Path) -> tuple[list[str], list[Rollout]]:
    return run_in_engine_process(_run, moe_model, "r3", env=V2)


@pytest.fixture(scope="module")
def native(moe_model: Path) -> tuple[list[str], list[Rollout]]:
    return run_in_engine_process(_run, moe_model, "vllm", env=V2)


def test_rows_are_those_of_transformers(
    ours: tuple[list[str], list[Rollout]], oracle: TransformersOracle
) -> None:
    bases, rollouts = ours
    assert "vllm.v1.worker.gpu.model_runner" in bases
    assert oracle.agreement(rollouts).differing == 0


def test_arrays_equal_those_of_vllms_own_path_which_the_backend_vllm_leaves_in_place(
    ours: tuple[list[str], list[Rollout]], native: tuple[str, list[Rollout]]
) -> None:
    assert "vllm_r3_plugin.scheduler" in ours[0]
    assert not any(module.startswith("vllm_r3_plugin") for module in native[0])
    assert set(native[0]) < set(ours[0])
    assert any(rollout.num_cached for rollout in ours[1])
    for own, theirs in zip(ours[1], native[1], strict=True):
        assert own.tokens == theirs.tokens
        np.testing.assert_array_equal(own.routed, theirs.routed)
        assert own.routed.dtype == theirs.routed.dtype
