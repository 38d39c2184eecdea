"""Requests that the client or a pause ends, on `AsyncLLM` with the engine core in its process."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from vllm_r3_plugin import front_end

from .rigs.engine import SETTINGS, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, from_outputs
from .rigs.transformers_oracle import TransformersOracle

ABORT_AFTER_TOKENS = 5


async def _last_output(engine: Any, name: str, prompt: list[int], on_output: Any = None) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=150, ignore_eos=True, detokenize=False)
    async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
        if on_output is not None:
            await on_output(output)
    return output


async def _abort_each(engine: Any, prompts: list[list[int]], prefix: str = "abort") -> list[Any]:
    aborted = set()

    async def abort(output: Any) -> None:
        name = output.request_id
        if len(output.outputs[0].token_ids) >= ABORT_AFTER_TOKENS and name not in aborted:
            aborted.add(name)
            await engine.abort(name)

    return await asyncio.gather(
        *(_last_output(engine, f"{prefix}-{i}", p, abort) for i, p in enumerate(prompts))
    )


async def _abort_each_without_rows(engine: Any, prompts: list[list[int]]) -> list[Any]:
    async def fails(*args: Any) -> None:
        raise RuntimeError("fails on demand")

    fetch, front_end._fetch_rows = front_end._fetch_rows, fails
    try:
        return await _abort_each(engine, prompts, "lost")
    finally:
        front_end._fetch_rows = fetch


async def _pause_all(engine: Any, prompts: list[list[int]]) -> list[Any]:
    started = [asyncio.Event() for _ in prompts]

    def note(event: asyncio.Event) -> Any:
        async def on_output(output: Any) -> None:
            if len(output.outputs[0].token_ids) >= ABORT_AFTER_TOKENS:
                event.set()

        return on_output

    running = [
        asyncio.create_task(_last_output(engine, f"pause-{i}", prompt, note(event)))
        for i, (prompt, event) in enumerate(zip(prompts, started, strict=True))
    ]
    await asyncio.gather(*(event.wait() for event in started))
    await engine.pause_generation(mode="abort")
    outputs = await asyncio.gather(*running)
    await engine.resume_generation()
    return outputs


async def _scenario(model: Path) -> dict[str, list[Rollout]]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **SETTINGS))
    prompts, _ = workload(16, seed=9)
    try:
        return {
            "aborted": from_outputs(await _abort_each(engine, prompts)),
            "aborted without rows": from_outputs(await _abort_each_without_rows(engine, prompts)),
            "paused": from_outputs(await _pause_all(engine, prompts)),
            "afterwards": from_outputs(
                await asyncio.gather(
                    *(_last_output(engine, f"after-{i}", p) for i, p in enumerate(prompts))
                )
            ),
        }
    finally:
        engine.shutdown()


def _run(model: Path) -> dict[str, list[Rollout]]:
    return asyncio.run(_scenario(model))


@pytest.fixture(scope="module")
def rollouts(moe_model: Path) -> dict[str, list[Rollout]]:
    return run_in_engine_process(_run, moe_model, in_process_core=False)


@pytest.mark.parametrize("group", ["aborted", "paused"])
def test_a_request_ended_early_returns_the_rows_of_the_tokens_it_returns(
    rollouts: dict[str, list[Rollout]], group: str, oracle: TransformersOracle
) -> None:
    assert {r.finish_reason for r in rollouts[group]} == {"abort"}
    assert all(ABORT_AFTER_TOKENS <= len(r.output) < 150 for r in rollouts[group])
    assert oracle.agreement(rollouts[group]).differing == 0


def test_an_abort_whose_rows_cannot_be_fetched_is_an_abort_all_the_same(
    rollouts: dict[str, list[Rollout]],
) -> None:
    lost = rollouts["aborted without rows"]
    assert {r.finish_reason for r in lost} == {"abort"}
    assert all(ABORT_AFTER_TOKENS <= len(r.output) < 150 and r.routed is None for r in lost)


def test_the_engine_serves_on_after_aborts_and_a_pause(
    rollouts: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    assert {r.finish_reason for r in rollouts["afterwards"]} == {"length"}
    assert oracle.agreement(rollouts["afterwards"]).differing == 0
