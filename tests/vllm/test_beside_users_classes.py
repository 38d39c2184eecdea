"""The plugin beside users' own worker, worker extension, scheduler and plugins, on live engines."""

from pathlib import Path
from typing import Any

import pytest

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout
from .rigs.transformers_oracle import TransformersOracle

USERS = "tests.vllm.rigs.users_classes"


def _run(model: Path, other_plugin_first: bool) -> tuple[dict[str, Any], list[Rollout]]:
    import vllm_r3_plugin

    from .rigs import users_classes

    if other_plugin_first:
        seen = users_classes.other_plugin()
        vllm_r3_plugin.register()
    else:
        vllm_r3_plugin.register()
        seen = users_classes.other_plugin()
    llm = start_engine(
        model,
        worker_cls=f"{USERS}.UsersWorker",
        worker_extension_cls=f"{USERS}.UsersExtension",
        scheduler_cls=f"{USERS}.UsersScheduler"
        if other_plugin_first
        else users_classes.UsersScheduler,
    )
    rollouts = generate(llm, *workload(30, seed=3))
    (worker,) = llm.collective_rpc("moe_layers_seen")
    core = llm.llm_engine.engine_core.engine_core
    found = {
        "worker": worker,
        "steps": core.scheduler.users_steps,
        "other": core.vllm_config.additional_config["other"],
        "seen": seen,
    }
    return found, rollouts


@pytest.fixture(scope="module", params=[True, False], ids=["other plugin first", "ours first"])
def run(
    request: pytest.FixtureRequest, moe_model: Path
) -> tuple[dict[str, Any], list[Rollout], bool]:
    found, rollouts = run_in_engine_process(_run, moe_model, request.param)
    return found, rollouts, request.param


def test_rows_are_those_of_transformers(
    run: tuple[dict[str, Any], list[Rollout], bool], oracle: TransformersOracle
) -> None:
    agreement = oracle.agreement(run[1])
    assert agreement.decisions > 1000
    assert agreement.differing == 0


def test_users_classes_and_the_other_plugin_do_their_work(
    run: tuple[dict[str, Any], list[Rollout], bool],
) -> None:
    found, _, other_plugin_first = run
    assert {"UsersWorker", "UsersExtension"} <= set(found["worker"]["classes"])
    assert found["worker"]["loads"] == 1
    assert found["steps"] > 10
    assert found["other"] >= 1
    # Who wraps first is called last, after the flag has been taken over.
    assert found["seen"][-1] is not other_plugin_first
