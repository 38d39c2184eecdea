"""Models whose MoE layers lie, route and count their experts in different ways."""

from pathlib import Path
from typing import Any

import pytest

from .rigs.engine import ALL_MODES, generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout
from .rigs.router_hook import RouterHook
from .rigs.tiny_layouts import LAYOUTS, make_layout
from .rigs.transformers_oracle import TransformersOracle

ALWAYS = [
    "every second layer of 256 experts",
    "300 experts",
    "latent attention, groups of experts",
    "one expert, every second layer",
]
CHOSEN = list(LAYOUTS) if ALL_MODES else ALWAYS


def _run(folder: Path, names: list[str]) -> dict[str, list[Rollout]]:
    return {name: _run_one(folder / str(i), name) for i, name in enumerate(names)}


def _run_one(path: Path, name: str) -> list[Rollout]:
    from vllm.distributed import cleanup_dist_env_and_memory

    layout = LAYOUTS[name]
    settings: dict[str, Any] = {"max_num_batched_tokens": 96, **layout.engine}
    llm = start_engine(make_layout(layout, path), **settings)
    hook = RouterHook(llm)
    rollouts = hook.attach_to(generate(llm, *workload(40, seed=3)))
    for rollout in rollouts:
        rollout.shape = layout.shape
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return rollouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[Rollout]]:
    return run_in_engine_process(_run, folder, CHOSEN)


@pytest.mark.parametrize("name", CHOSEN)
def test_rows_are_the_routers_own_in_order_and_those_of_transformers(
    runs: dict[str, list[Rollout]], folder: Path, name: str
) -> None:
    assert sum(rollout.ordered_differences() for rollout in runs[name]) == 0
    agreement = TransformersOracle(folder / str(CHOSEN.index(name))).agreement(runs[name])
    assert agreement.decisions > 2000
    assert agreement.differing == 0
    assert agreement.ties < agreement.decisions / 100
