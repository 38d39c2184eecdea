"""What only a CUDA GPU can show; on one, run this file by itself: `pytest -m gpu`.

It uses what vLLM 0.26 and 0.32 both have. In float32 vLLM takes its Triton attention by itself, so
that flash attention need not be installed.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shared_schema import RoutingLayout
from vllm_r3_plugin.capturer import RouterSource, RoutingCapturer, _router_attacher
from vllm_r3_plugin.host_copy import HostCopy

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible here"),
]

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def witnessed(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a workload; compare each step's payload with what the device itself recorded."""
    from vllm_r3_plugin import step_capture

    payloads, attach = [], step_capture.attach_rows

    def attach_rows(output: Any, rows: Any) -> None:
        payloads.append(rows.ids.copy())
        attach(output, rows)

    step_capture.attach_rows = attach_rows
    llm = start_engine(model, worker_cls="tests.vllm.rigs.device_witness.WitnessWorker", **settings)
    prompts, params = workload(120, seed=11)
    rollouts = generate(llm, prompts, params)
    for rollout in rollouts:
        rollout.check_form()
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    steps = worker.witness.steps[-len(payloads) :]  # a profiling run has steps of its own
    return {
        "steps": len(payloads),
        "different": sum(
            not np.array_equal(own, seen) for own, seen in zip(payloads, steps, strict=True)
        ),
        "decodes": sum(len(own) <= 32 for own in payloads),
        "graphs": str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode),
    }


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "compiled and in graphs"])
def test_each_step_sends_the_ids_that_its_routers_computed(
    moe_model: Path, enforce_eager: bool, async_scheduling: bool
) -> None:
    settings = {"enforce_eager": enforce_eager, "async_scheduling": async_scheduling}
    seen = run_in_engine_process(witnessed, moe_model, settings)
    assert seen["different"] == 0
    assert seen["decodes"] >= 10
    assert enforce_eager or "FULL" in seen["graphs"] or "PIECEWISE" in seen["graphs"]


def big_capturer(device: torch.device) -> RoutingCapturer:
    """A buffer of a step of 16,384 tokens."""
    layout = RoutingLayout(128, 8, tuple(range(48)), 48)
    return RoutingCapturer(layout, 16384, device)


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def overwrite_after_snapshot(capturer: RoutingCapturer, busy: Any) -> tuple[HostCopy, HostCopy]:
    """Two steps without a wait between them: the second overwrites the buffer of the first."""
    capturer._buffer.fill_(1)
    first = capturer.copy_rows(16384)
    busy()
    capturer._buffer.fill_(2)
    second = capturer.copy_rows(16384)
    return first, second


def test_a_step_keeps_its_ids_while_the_next_overwrites_the_buffer(gpu: torch.device) -> None:
    matrix = torch.randn(4096, 4096, device=gpu)
    capturer = big_capturer(gpu)
    for _ in range(20):
        first, second = overwrite_after_snapshot(capturer, lambda: matrix @ matrix)
        assert (first.wait() == 1).all()
        assert (second.wait() == 2).all()


def test_nothing_waits_for_the_device_until_the_rows_are_asked_for(gpu: torch.device) -> None:
    capturer = big_capturer(gpu)
    positions = torch.arange(16384, device=gpu)

    def step() -> tuple[HostCopy, HostCopy]:
        capturer.arm(16384)
        return capturer.copy_rows(16384), HostCopy(positions, 16384)

    kept = [step() for _ in range(3)]  # the first pinned blocks are allocated, which waits
    torch.cuda.synchronize()
    del kept
    with torch.profiler.profile() as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            ids, places = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    calls = {event.key: event.count for event in profile.key_averages() if event.key in WAITS}
    # The profiler itself waits once when it stops.
    assert sum(calls.values()) <= 1, calls
    names = {event.key for event in profile.key_averages()}
    assert any("Memcpy DtoH" in name and "Pinned" in name for name in names), names
    assert (places.wait() == np.arange(16384)).all()
    assert ids.wait().shape == (16384, 48, 8)


def test_the_copy_runs_beside_the_next_step(gpu: torch.device) -> None:
    from vllm_r3_plugin.host_copy import _copy_stream

    capturer = big_capturer(gpu)
    matrix = torch.randn(8192, 8192, device=gpu, dtype=torch.bfloat16)
    capturer.copy_rows(16384).wait()
    started, computed, copied = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    started.record()
    rows = capturer.copy_rows(16384)
    copied.record(_copy_stream(gpu))
    for _ in range(400):
        matrix @ matrix
    computed.record()
    assert not computed.query(), "the compute ended before it was measured: make it longer"
    rows.wait()
    assert not computed.query(), "the copy waited for the next step"
    torch.cuda.synchronize()
    assert started.elapsed_time(copied) < started.elapsed_time(computed)


def eplb_choice(device: torch.device) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chosen ids, captured ids, and the physical ids that the kernel gets, [32, 4] each."""
    from .test_capturer import GivenRouter

    num_experts, rows = 16, 32
    state = SimpleNamespace(
        expert_load_view=torch.zeros(num_experts, dtype=torch.int32, device=device),
        logical_to_physical_map=torch.arange(num_experts - 1, -1, -1, device=device)[:, None],
        logical_replica_count=torch.ones(num_experts, dtype=torch.int64, device=device),
        should_record_tensor=torch.zeros((), dtype=torch.bool, device=device),
        num_unpadded_tokens_tensors=[torch.tensor(rows, dtype=torch.int32, device=device)],
    )
    router = GivenRouter(4, num_experts, eplb_state=state)
    layout = RoutingLayout(num_experts, 4, (0,), 1)
    capturer = RoutingCapturer(layout, rows, device)
    capturer.bind([RouterSource(0, "layers.0", 4, _router_attacher(router))])
    generator = torch.Generator().manual_seed(0)
    ids = torch.argsort(torch.rand(rows, num_experts, generator=generator), dim=1)[:, :4]
    ids = ids.int().to(device)
    capturer.arm(rows)
    _, physical = router._select_experts(ids, ids)[:2]
    return ids.cpu().numpy(), capturer.copy_rows(rows).wait()[:, 0], physical.cpu().numpy()


def test_under_eplb_the_ids_are_logical(gpu: torch.device) -> None:
    chosen, captured, physical = eplb_choice(gpu)
    assert (physical == 15 - chosen).all()
    assert (captured == chosen).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="EPLB needs two GPUs")
def test_an_engine_with_eplb_returns_the_rows_of_one_without(moe_model: Path) -> None:
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    balanced = {"enable_eplb": True, "eplb_config": {"step_interval": 8, "window_size": 8}}
    plain = run_in_engine_process(greedy, moe_model, parallel, in_process_core=False)
    moved = run_in_engine_process(
        greedy, moe_model, {**parallel, **balanced}, in_process_core=False
    )
    same = [(a, b) for a, b in zip(plain, moved, strict=True) if a.tokens == b.tokens]
    assert len(same) > len(plain) // 2
    differing = sum(int((a.routed != b.routed).any((1, 2)).sum()) for a, b in same)
    # Physical ids would differ nearly everywhere; a sum in another order moves a tie at most.
    assert differing < 0.01 * sum(len(a.routed) for a, _ in same)


def greedy(model: Path, settings: dict[str, Any]) -> Any:
    """Roll out greedily."""
    prompts, params = workload(60, seed=12)
    for param in params:
        param.temperature = 0.0
    return generate(start_engine(model, **settings), prompts, params)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("store_step", ""),
        (
            "capture_throughput",
            "--hidden-size 2048 --layers 24 --load-format dummy --graphs --rounds 12 "
            "--concurrency 8 32 128 256 --prompt-tokens 256 --output-tokens 256",
        ),
    ],
)
def test_the_benchmark_runs_at_its_real_size(name: str, arguments: str) -> None:
    """Prints the figures for docs/benchmarks.md."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments.split()]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    print(json.dumps(result, indent=1))
    assert np.isfinite(result.get("ratio_on_off", result.get("speedup")))
