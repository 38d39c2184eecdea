"""Models whose KV cache has several groups of blocks, or none that keeps every token."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs import hybrid_models
from .rigs.engine import generate, start_engine
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, random_prompts
from .rigs.router_hook_by_prefix import RouterHookByPrefix
from .rigs.transformers_oracle import TransformersOracle

MODELS = {
    "sliding window + full attention": lambda path: hybrid_models.make_sliding(
        path, ["sliding_attention", "full_attention"] * 2
    ),
    "sliding window": lambda path: hybrid_models.make_sliding(path, ["sliding_attention"] * 4),
    "linear + full attention": hybrid_models.make_linear_attention,
}
ENGINES: dict[str, dict[str, Any]] = {
    "sliding window + full attention": {"num_gpu_blocks_override": 64},
    "sliding window": {"num_gpu_blocks_override": 32},
    # vLLM's CPU kernel of linear attention knows bfloat16 only. Its blocks are of 288 tokens;
    # with a finer match unit a hit may end inside of one, which is then copied on write.
    "linear + full attention": {
        "dtype": "bfloat16",
        "prefix_match_unit": 32,
        "max_model_len": 1024,
    },
}


@dataclass
class Run:
    managers: list[str]
    rollouts: list[Rollout]
    foreign_rows: int
    hits: int
    copied_blocks: int


def _requests(rng: np.random.Generator, longest: int) -> list[list[list[int]]]:
    """Batches of prompts that share more or less of a common beginning."""
    (base,) = random_prompts(rng, [longest])

    def continued(count: int) -> list[list[int]]:
        return [
            base[: int(shared)] + random_prompts(rng, [int(own)])[0]
            for shared, own in zip(
                rng.integers(20, longest, count), rng.integers(1, 30, count), strict=True
            )
        ]

    return [[base[: longest * 3 // 4]], [base, base[:64], *continued(8)], continued(12)]


def _run(model: Path, name: str) -> Run:
    from vllm import SamplingParams

    llm = start_engine(model, **ENGINES[name])
    hook = RouterHookByPrefix(llm)
    copied_blocks = 0
    schedule = hook.scheduler.schedule

    def count_copies(*args: Any, **kwargs: Any) -> Any:
        nonlocal copied_blocks
        output = schedule(*args, **kwargs)
        copied_blocks += len(output.kv_cache_block_copies or ())
        return output

    hook.scheduler.schedule = count_copies
    longest = ENGINES[name].get("max_model_len", 256) - 60
    rollouts = []
    for prompts in _requests(np.random.default_rng(0), longest):
        params = [SamplingParams(max_tokens=16, detokenize=False) for _ in prompts]
        rollouts += hook.attach_to(generate(llm, prompts, params))
    return Run(
        [
            type(m).__name__
            for m in hook.scheduler.kv_cache_manager.coordinator.single_type_managers
        ],
        rollouts,
        sum(hook.foreign_rows(rollout) for rollout in rollouts),
        hook.hits,
        copied_blocks,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("hybrid")) for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def runs(models: dict[str, Path]) -> dict[str, Run]:
    return {name: run_in_engine_process(_run, path, name) for name, path in models.items()}


@pytest.mark.parametrize(
    ("name", "managers"),
    [
        ("sliding window + full attention", ["SlidingWindowManager", "FullAttentionManager"]),
        ("sliding window", ["SlidingWindowManager"]),
        ("linear + full attention", ["MambaManager"] * 3 + ["FullAttentionManager"]),
    ],
)
def test_every_row_is_the_routers_own_also_behind_hits(
    runs: dict[str, Run], name: str, managers: list[str]
) -> None:
    run = runs[name]
    assert run.managers == managers
    assert run.hits >= 10
    assert run.foreign_rows == 0


@pytest.mark.parametrize("name", ["sliding window + full attention", "sliding window"])
def test_rows_are_those_of_transformers(
    runs: dict[str, Run], models: dict[str, Path], name: str
) -> None:
    assert TransformersOracle(models[name]).agreement(runs[name].rollouts).differing == 0
    assert sum(rollout.ordered_differences() for rollout in runs[name].rollouts) == 0


def test_hits_ended_inside_blocks_which_were_copied(runs: dict[str, Run]) -> None:
    run = runs["linear + full attention"]
    assert run.copied_blocks >= 3
    assert {rollout.num_cached % 288 for rollout in run.rollouts} > {0}
