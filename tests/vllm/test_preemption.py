"""Preemption with a KV cache that is too small, and new weights between a row's two passes."""

from pathlib import Path

import pytest

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import TransformersOracle

NUM_BLOCKS = 16
SWAP_AT_STEPS = (8, 20, 32)


def _run(model: Path, other_model: Path) -> dict[str, list[Rollout]]:
    llm = start_engine(model, num_gpu_blocks_override=NUM_BLOCKS)
    hook = RouterHook(llm)
    weights = [other_model, model]

    def swap_weights(step: int) -> None:
        if step in SWAP_AT_STEPS:
            weights.reverse()
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights[1])})

    def swap_weights_and_reset(step: int) -> None:
        swap_weights(step)
        if step in SWAP_AT_STEPS:
            assert llm.reset_prefix_cache(reset_running_requests=True)

    return {
        "same weights": hook.attach_to(generate(llm, *workload(120, seed=1))),
        "swapped": hook.attach_to(generate(llm, *workload(60, seed=2), swap_weights)),
        "swapped and reset": hook.attach_to(
            generate(llm, *workload(60, seed=3), swap_weights_and_reset)
        ),
    }


@pytest.fixture(scope="module")
def rollouts(moe_model: Path, other_moe_model: Path) -> dict[str, list[Rollout]]:
    return run_in_engine_process(_run, moe_model, other_moe_model)


def test_preempted_requests_return_the_rows_of_transformers(
    rollouts: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    assert sum(r.num_preemptions > 0 for r in rollouts["same weights"]) >= 2
    assert oracle.agreement(rollouts["same weights"]).differing == 0


@pytest.mark.parametrize("phase", ["same weights", "swapped", "swapped and reset"])
def test_first_emitted_rows_win_in_the_routers_order(
    rollouts: dict[str, list[Rollout]], phase: str
) -> None:
    assert sum(r.num_preemptions > 0 for r in rollouts[phase]) >= 2
    assert sum(r.ordered_differences() for r in rollouts[phase]) == 0


@pytest.mark.parametrize("phase", ["swapped", "swapped and reset"])
def test_new_weights_did_route_recomputed_rows_otherwise(
    rollouts: dict[str, list[Rollout]], phase: str
) -> None:
    assert sum(r.superseded for r in rollouts[phase]) >= 5
