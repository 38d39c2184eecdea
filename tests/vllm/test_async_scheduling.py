"""Asynchronous scheduling with two batches in flight, preemption under it, and lost payloads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import force_async_scheduling, generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.lost_payloads import losing_payloads
from .rigs.rollouts import random_prompts
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import TransformersOracle


def _ending_while_preempted() -> tuple[list[list[int]], list[Any]]:
    """Requests that await their second and last token while others, of equal age, need a block.

    Lengths alone decide what is scheduled, so the same requests are preempted in every run.
    """
    from vllm import SamplingParams

    prompts = random_prompts(np.random.default_rng(0), [29] * 120)
    return prompts, [
        SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in [2, 8] * 60
    ]


def _run(model: Path) -> dict[str, Any]:
    force_async_scheduling()
    llm = start_engine(model, num_gpu_blocks_override=12)
    hook = RouterHook(llm)
    rollouts = generate(llm, *workload(240, seed=4)) + generate(llm, *_ending_while_preempted())
    whole = {
        "rollouts": hook.attach_to(rollouts),
        "max_concurrent_batches": hook.max_concurrent_batches,
        "preempted_in_flight": hook.preempted_in_flight,
        "finished_while_preempted": hook.finished_while_preempted,
    }
    with losing_payloads(0.05) as lost:
        rollouts = hook.attach_to(generate(llm, *workload(240, seed=8)))
    return {"whole": whole, "lossy": {"rollouts": rollouts, "lost": sum(lost)}}


@pytest.fixture(scope="module")
def runs(moe_model: Path) -> dict[str, Any]:
    return run_in_engine_process(_run, moe_model)


def test_two_batches_were_in_flight_and_requests_were_preempted_under_them(
    runs: dict[str, Any],
) -> None:
    assert runs["whole"]["max_concurrent_batches"] == 2
    assert runs["whole"]["preempted_in_flight"] >= 10
    assert runs["whole"]["finished_while_preempted"] >= 1


def test_rows_are_the_routers_own_in_order(runs: dict[str, Any]) -> None:
    assert sum(r.ordered_differences() for r in runs["whole"]["rollouts"]) == 0


def test_rows_are_those_of_transformers(runs: dict[str, Any], oracle: TransformersOracle) -> None:
    assert oracle.agreement(runs["whole"]["rollouts"]).differing == 0


def test_lost_payloads_cost_arrays_but_never_make_a_wrong_one(runs: dict[str, Any]) -> None:
    assert runs["lossy"]["lost"] >= 3
    returned = [r for r in runs["lossy"]["rollouts"] if r.routed is not None]
    assert 0 < len(returned) < len(runs["lossy"]["rollouts"])
    assert sum(r.ordered_differences() for r in returned) == 0
