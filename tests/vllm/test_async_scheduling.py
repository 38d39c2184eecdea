"""Asynchronous scheduling with two batches in flight, preemption under it, and lost payloads."""

from pathlib import Path
from typing import Any

import pytest

from .rigs.engine import force_async_scheduling, generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.lost_payloads import losing_payloads
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import TransformersOracle


def _run(model: Path) -> dict[str, Any]:
    force_async_scheduling()
    llm = start_engine(model, num_gpu_blocks_override=12)
    hook = RouterHook(llm)
    whole = {
        "rollouts": hook.attach_to(generate(llm, *workload(240, seed=4))),
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
