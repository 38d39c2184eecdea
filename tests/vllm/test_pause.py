"""Weights that change while `AsyncLLM` is paused: each row is of the weights that fed its token."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import ROUTER_UPDATE, SETTINGS
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, from_outputs, random_prompts
from .rigs.transformers_oracle import Agreement, TransformersOracle, compare_sets

PAUSE_AFTER_TOKENS = 6
NUM_TOKENS = 150
# Mode of the pause, whether it clears the cache, and the weights before and after it.
PAUSES = {
    "keep": ("keep", False, "AB"),
    "keep, cache cleared": ("keep", True, "BA"),
    "wait": ("wait", True, "AB"),
    "abort": ("abort", True, "BA"),
}


async def _paused(
    engine: Any, name: str, weights: Path, prompts: list[list[int]]
) -> tuple[list[Rollout], list[int]]:
    """Rollouts that a pause met, and how many tokens each had at that time."""
    from vllm import SamplingParams

    mode, clear_cache, _ = PAUSES[name]
    num_tokens = [0] * len(prompts)
    begun = [asyncio.Event() for _ in prompts]

    async def run(i: int) -> Any:
        params = SamplingParams(
            temperature=1.0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False
        )
        prompt = {"prompt_token_ids": prompts[i]}
        async for output in engine.generate(prompt, params, f"{name}-{i}"):
            num_tokens[i] = len(output.outputs[0].token_ids)
            if num_tokens[i] >= PAUSE_AFTER_TOKENS:
                begun[i].set()
        return output

    running = [asyncio.create_task(run(i)) for i in range(len(prompts))]
    await asyncio.gather(*(event.wait() for event in begun))
    await engine.pause_generation(mode=mode, clear_cache=clear_cache)
    await asyncio.sleep(0.2)  # what the engine core sent before the pause arrives
    at_pause = list(num_tokens)
    await engine.collective_rpc("load_routers", args=(str(weights),))
    await engine.resume_generation()
    return from_outputs(await asyncio.gather(*running)), at_pause


async def _scenario(paths: dict[str, Path]) -> dict[str, Any]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = {**SETTINGS, "worker_extension_cls": ROUTER_UPDATE}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(paths["A"]), **settings))
    prompts = random_prompts(np.random.default_rng(3), [40, 75, 100, 33])
    found = {}
    try:
        for name, (_, _, weights) in PAUSES.items():
            found[name] = await _paused(engine, name, paths[weights[1]], prompts)
            await engine.reset_prefix_cache()
        return found
    finally:
        engine.shutdown()


def _run(paths: dict[str, Path]) -> dict[str, Any]:
    return asyncio.run(_scenario(paths))


@pytest.fixture(scope="module")
def paths(moe_model: Path, updated_moe_model: Path) -> dict[str, Path]:
    return {"A": moe_model, "B": updated_moe_model}


@pytest.fixture(scope="module")
def oracles(paths: dict[str, Path]) -> dict[str, TransformersOracle]:
    return {name: TransformersOracle(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def found(paths: dict[str, Path]) -> dict[str, Any]:
    return run_in_engine_process(_run, paths, in_process_core=False)


@pytest.mark.parametrize("name", ["keep", "keep, cache cleared"])
def test_a_request_that_goes_on_with_new_weights_has_rows_of_both(
    found: dict[str, Any], name: str, oracles: dict[str, TransformersOracle]
) -> None:
    _, clear_cache, (old, new) = PAUSES[name]
    agreement, against_old = Agreement(0, 0, 0), Agreement(0, 0, 0)
    for rollout, at_pause in zip(*found[name], strict=True):
        assert PAUSE_AFTER_TOKENS <= at_pause < len(rollout.output) == NUM_TOKENS
        num_old = len(rollout.prompt) + at_pause - 1
        (before,) = oracles[old].router_logits([rollout.tokens[:num_old]])
        if clear_cache:  # the KV was computed again, the rows of emitted tokens stayed
            (after,) = oracles[new].router_logits([rollout.tokens[:-1]])
            after = after[num_old:]
        else:
            after = oracles[new].router_logits_behind(
                oracles[old], rollout.tokens[:num_old], rollout.tokens[num_old:-1]
            )
        (all_old,) = oracles[old].router_logits([rollout.tokens[:-1]])
        agreement += compare_sets(rollout.moe_ids(), np.concatenate([before, after]))
        against_old += compare_sets(rollout.moe_ids()[num_old:], all_old[num_old:])
    assert agreement.differing == 0
    assert against_old.differing > against_old.decisions // 2


@pytest.mark.parametrize("name", ["wait", "abort"])
def test_requests_that_end_with_the_pause_have_rows_of_the_old_weights(
    found: dict[str, Any], name: str, oracles: dict[str, TransformersOracle]
) -> None:
    rollouts, _ = found[name]
    reason, length = ("length", NUM_TOKENS) if name == "wait" else ("abort", None)
    assert {rollout.finish_reason for rollout in rollouts} == {reason}
    assert all(length in (None, len(rollout.output)) for rollout in rollouts)
    assert oracles[PAUSES[name][2][0]].agreement(rollouts).differing == 0
