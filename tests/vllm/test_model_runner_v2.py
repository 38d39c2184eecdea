"""Model Runner V2, in Triton's interpreter, where vLLM's own path runs too: array by array."""

import itertools
import multiprocessing
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import force_async_scheduling, generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, random_prompts
from .rigs.transformers_oracle import TransformersOracle

V2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
BACKENDS = ("r3", "vllm")
CHUNK = 40


@dataclass
class Run:
    rollouts: list[Rollout]
    modules: list[str]
    batches_in_flight: int
    chunks: int
    preempted_in_flight: list[bool]


def _run_all(model: Path) -> dict[tuple[str, bool], Run]:
    """Both backends, synchronous and asynchronous, forked after the imports that they share."""
    import triton.backends

    # Triton looks for an active driver before it interprets.
    driver = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
    import vllm.v1.worker.gpu.model_runner  # noqa: F401

    found = {}
    for backend, asynchronous in itertools.product(BACKENDS, (False, True)):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found[backend, asynchronous] = pool.apply(_run, (model, backend, asynchronous))
    return found


def _run(model: Path, backend: str, asynchronous: bool) -> Run:
    if asynchronous:
        force_async_scheduling()
    llm = start_engine(
        model,
        num_gpu_blocks_override=12,
        long_prefill_token_threshold=CHUNK,
        additional_config={"r3": {"backend": backend}},
    )
    core = llm.llm_engine.engine_core.engine_core
    worker, scheduler = core.model_executor.driver_worker.worker, core.scheduler
    preempted_in_flight, preempt = [], scheduler._preempt_request
    chunks, schedule = [], scheduler.schedule

    def preempt_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted_in_flight.append(request.num_in_flight_tokens > 0)
        return preempt(request, *args, **kwargs)

    def note_chunks(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        chunks.extend(n for n in output.num_scheduled_tokens.values() if n == CHUNK)
        return output

    scheduler._preempt_request, scheduler.schedule = preempt_request, note_chunks
    rollouts = []
    for prompts, params in (workload(20, seed=10, max_tokens=12), _ending_together()):
        for param in params:
            param.temperature = 0.0  # the same tokens in all runs
        rollouts += generate(llm, prompts, params)
    return Run(
        rollouts,
        [
            base.__module__
            for part in (worker.model_runner, worker, scheduler)
            for base in type(part).__mro__
        ],
        core.vllm_config.max_concurrent_batches,
        len(chunks),
        preempted_in_flight,
    )


def _ending_together() -> tuple[list[list[int]], list[Any]]:
    """Requests of equal age that all need a second block at once: lengths decide who gets one."""
    from vllm import SamplingParams

    prompts = random_prompts(np.random.default_rng(0), [29] * 24)
    return prompts, [
        SamplingParams(max_tokens=n, ignore_eos=True, detokenize=False) for n in [2, 8] * 12
    ]


@pytest.fixture(scope="module")
def runs(moe_model: Path) -> dict[tuple[str, bool], Run]:
    return run_in_engine_process(_run_all, moe_model, env=V2)


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def ours(runs: dict[tuple[str, bool], Run], asynchronous: bool) -> Run:
    return runs["r3", asynchronous]


@pytest.fixture
def native(runs: dict[tuple[str, bool], Run], asynchronous: bool) -> Run:
    return runs["vllm", asynchronous]


def test_v2_hit_the_prefix_cache_chunked_prompts_and_preempted_requests(
    ours: Run, native: Run, asynchronous: bool
) -> None:
    for run in (ours, native):
        assert "vllm.v1.worker.gpu.model_runner" in run.modules
        assert run.batches_in_flight == 1 + asynchronous
        assert sum(rollout.num_cached > 0 for rollout in run.rollouts) >= 3
        assert run.chunks >= 5
        assert len(run.preempted_in_flight) >= 3
        assert any(run.preempted_in_flight) == asynchronous


def test_rows_are_those_of_transformers(ours: Run, oracle: TransformersOracle) -> None:
    assert oracle.agreement(ours.rollouts).differing == 0


def test_arrays_equal_those_of_vllms_own_path_which_the_backend_vllm_leaves_in_place(
    ours: Run, native: Run
) -> None:
    assert "vllm_r3_plugin.scheduler" in ours.modules
    assert not any(module.startswith("vllm_r3_plugin") for module in native.modules)
    assert set(native.modules) < set(ours.modules)
    for own, theirs in zip(ours.rollouts, native.rollouts, strict=True):
        assert own.tokens == theirs.tokens
        np.testing.assert_array_equal(own.routed, theirs.routed)
        assert own.routed.dtype == theirs.routed.dtype
