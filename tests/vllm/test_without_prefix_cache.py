"""Prefix caching switched off, with preemption, so that every row is computed by its request."""

from pathlib import Path
from typing import Any

import pytest

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import TransformersOracle


def _run(model: Path) -> dict[str, Any]:
    llm = start_engine(model, enable_prefix_caching=False, num_gpu_blocks_override=16)
    hook = RouterHook(llm)
    rollouts = hook.attach_to(generate(llm, *workload(100, seed=5)))
    prompts, params = workload(30, seed=6)
    for param in params:
        param.extra_args = {"r3_routing": "off"}
    store = hook.scheduler.r3_store
    pages: list[int] = []
    off = generate(llm, prompts, params, lambda step: pages.append(store.num_pages))
    returned = [r.routed is not None for r in off]
    return {"rollouts": rollouts, "hits": hook.hits, "pages": pages, "returned": returned}


@pytest.fixture(scope="module")
def run(moe_model: Path) -> dict[str, Any]:
    return run_in_engine_process(_run, moe_model)


def test_nothing_was_cached_and_requests_were_preempted(run: dict[str, Any]) -> None:
    assert run["hits"] == 0
    assert sum(r.num_preemptions > 0 for r in run["rollouts"]) >= 5


def test_rows_are_the_routers_own_in_order(run: dict[str, Any]) -> None:
    assert sum(r.ordered_differences() for r in run["rollouts"]) == 0


def test_rows_are_those_of_transformers(run: dict[str, Any], oracle: TransformersOracle) -> None:
    assert oracle.agreement(run["rollouts"]).differing == 0


def test_requests_with_routing_off_are_not_kept_where_nobody_can_hit_them(
    run: dict[str, Any],
) -> None:
    assert len(run["pages"]) >= 20
    assert not any(run["pages"][1:])
    assert not any(run["returned"])
