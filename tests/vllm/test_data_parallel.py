"""Data parallelism: two engine cores and their workers, one front end."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from .rigs.engine import ALL_MODES, SETTINGS, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, from_outputs
from .rigs.transformers_oracle import TransformersOracle

MODES: dict[str, dict[str, Any]] = {
    "data, expert and sequence parallel": {
        "enable_expert_parallel": True,
        "tensor_parallel_size": 2,
    },
}
if ALL_MODES:
    MODES["data parallel"] = {}
    MODES["data and expert parallel"] = {"enable_expert_parallel": True}


async def _generate(engine: Any, group: str, ranks: list[int], abort_at: int = 0) -> list[Rollout]:
    """One request for each of `ranks`, all at once."""
    prompts, params = workload(len(ranks), seed=len(group), max_tokens=40)
    if abort_at:
        for param in params:
            param.max_tokens, param.ignore_eos = 150, True

    async def last_output(i: int) -> Any:
        name = f"{group}-{i}"
        aborted = False
        async for output in engine.generate(
            {"prompt_token_ids": prompts[i]}, params[i], name, data_parallel_rank=ranks[i]
        ):
            if 0 < abort_at <= len(output.outputs[0].token_ids) and not aborted:
                aborted = True
                await engine.abort(name)
        return output

    return from_outputs(await asyncio.gather(*(last_output(i) for i in range(len(ranks)))))


async def _scenario(model: Path, mode: dict[str, Any]) -> dict[str, list[Rollout]]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    worker = "tests.vllm.rigs.workers.ExpertParallelWorker"
    settings = {**SETTINGS, "data_parallel_size": 2, "worker_cls": worker, **mode}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **settings))
    try:
        return {
            "both ranks": await _generate(engine, "both", [0, 1] * 16),
            "rank 0 alone": await _generate(engine, "first", [0] * 8),
            "rank 1 alone": await _generate(engine, "second", [1] * 8),
            "aborted": await _generate(engine, "aborted", [0, 1] * 6, abort_at=3),
        }
    finally:
        engine.shutdown()


def _run(model: Path, mode: dict[str, Any]) -> dict[str, list[Rollout]]:
    return asyncio.run(_scenario(model, mode))


@pytest.fixture(scope="module", params=MODES.values(), ids=list(MODES))
def rollouts(request: pytest.FixtureRequest, moe_model: Path) -> dict[str, list[Rollout]]:
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0|1" if len(request.param) == 2 else "0|1"}
    return run_in_engine_process(_run, moe_model, request.param, in_process_core=False, env=env)


def test_every_rank_returns_its_own_rows_also_while_the_other_is_idle(
    rollouts: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    for group in ("both ranks", "rank 0 alone", "rank 1 alone"):
        agreement = oracle.agreement(rollouts[group])
        assert agreement.decisions > 1000
        assert agreement.differing == 0


def test_an_abort_reaches_the_rank_that_runs_the_request(
    rollouts: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    assert {r.finish_reason for r in rollouts["aborted"]} == {"abort"}
    assert oracle.agreement(rollouts["aborted"]).differing == 0
