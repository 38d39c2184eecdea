"""The plugin beside users' own worker, worker extension, scheduler and plugins, on live engines."""

from pathlib import Path
from typing import Any

import pytest

from .rigs.engine import force_async_scheduling, generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout
from .rigs.transformers_oracle import TransformersOracle

USERS = "tests.vllm.rigs.users_classes"


def _run(
    model: Path, folder: Path, other_plugin_first: bool
) -> tuple[dict[str, Any], list[Rollout]]:
    import vllm_r3_plugin

    from .rigs import users_classes

    if other_plugin_first:
        seen = users_classes.other_plugin()
        vllm_r3_plugin.register()
        scheduler: type | str = f"{USERS}.UsersScheduler"
    else:
        vllm_r3_plugin.register()
        seen = users_classes.other_plugin()
        scheduler = users_classes.UsersAsyncScheduler
        force_async_scheduling()
    users_classes.install_plugin(folder / "absent", "users_absent", "no_such_package:register")
    users_classes.install_plugin(folder / "raises", "users_raises", f"{USERS}:raises_in_register")
    settings = {
        "worker_cls": f"{USERS}.UsersWorker",
        "worker_extension_cls": f"{USERS}.UsersExtension",
        "scheduler_cls": scheduler,
    }
    with pytest.raises(RuntimeError) as error:
        start_engine(model, **settings)
    llm = start_engine(model, **settings)
    rollouts = generate(llm, *workload(30, seed=3))
    (worker,) = llm.collective_rpc("moe_layers_seen")
    core = llm.llm_engine.engine_core.engine_core
    found = {
        "worker": worker,
        "scheduler": [base.__name__ for base in type(core.scheduler).__mro__],
        "steps": core.scheduler.users_steps,
        "max_concurrent_batches": core.vllm_config.max_concurrent_batches,
        "other": core.vllm_config.additional_config["other"],
        "seen": seen,
        "error": str(error.value),
    }
    return found, rollouts


@pytest.fixture(scope="module", params=[True, False], ids=["other plugin first", "ours first"])
def run(
    request: pytest.FixtureRequest, moe_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[Rollout], bool]:
    folder = tmp_path_factory.mktemp("plugins")
    found, rollouts = run_in_engine_process(_run, moe_model, folder, request.param)
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
    users_scheduler = "UsersScheduler" if other_plugin_first else "UsersAsyncScheduler"
    assert found["scheduler"][:2] == [f"Routing{users_scheduler}", "RoutingScheduler"]
    assert found["scheduler"][2] == users_scheduler
    assert found["max_concurrent_batches"] == (1 if other_plugin_first else 2)
    assert found["steps"] > 10
    assert found["other"] >= 1
    # Who wraps first is called last, after the flag has been taken over.
    assert found["seen"][-1] is not other_plugin_first


def test_a_plugin_that_raises_stops_vllm_with_its_own_error_and_only_once(
    run: tuple[dict[str, Any], list[Rollout], bool],
) -> None:
    found, rollouts, _ = run
    assert found["error"] == "the users' plugin is broken"
    assert all(rollout.routed is not None for rollout in rollouts)
