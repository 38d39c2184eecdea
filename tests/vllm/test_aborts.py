"""Requests that the client or a pause ends, on `AsyncLLM` with the engine core in its process.

Each prompt is completed twice (`n=2`); every other one asks for the r3 encoding, some for a stop
string that never comes, with which rows leave in parts.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from shared_schema import RoutingLayout, decode, encode, to_vllm_native
from vllm_r3_plugin import fetch_async, front_end

from .rigs.engine import SETTINGS, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, from_outputs
from .rigs.tiny_models import MOE_LAYERS, NUM_EXPERTS, NUM_LAYERS, TOP_K
from .rigs.transformers_oracle import TransformersOracle

LAYOUT = RoutingLayout(NUM_EXPERTS, TOP_K, MOE_LAYERS, NUM_LAYERS)
ABORT_AFTER_TOKENS = 5


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])


def _leaves_in_parts(name: str) -> bool:
    return _number(name) % 4 < 2


async def _last_output(engine: Any, name: str, prompt: list[int], on_output: Any = None) -> Any:
    """The last output, with the last completion of each index."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=1.0,
        max_tokens=150,
        ignore_eos=True,
        n=2,
        stop=["\N{SNOWMAN}"] if _leaves_in_parts(name) else None,
        extra_args={"r3_encoding": "r3"} if _number(name) % 2 else None,
    )
    if name.startswith("fetch"):
        params.extra_args = {**(params.extra_args or {}), "r3_delivery": "fetch"}
    completions = {}
    async for output in engine.generate({"prompt_token_ids": prompt}, params, name):
        completions.update({completion.index: completion for completion in output.outputs})
        if on_output is not None:
            await on_output(output)
    output.outputs = list(completions.values())
    return output


def _rollouts(outputs: list[Any]) -> list[Rollout]:
    """Rollouts with the native form of rows that came encoded, if none is unrecorded."""
    rollouts = from_outputs(outputs)
    for rollout in rollouts:
        if isinstance(rollout.routed, bytes):
            routed = decode(rollout.routed, LAYOUT)
            rollout.routed = to_vllm_native(routed) if routed.is_complete else None
            rollout.prompt_start = routed.token_start
    return rollouts


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


async def _fetched(engine: Any, outputs: list[Any]) -> list[Any]:
    """The same with the rows that the paths lead to."""
    for output in outputs:
        for completion in output.outputs:
            assert completion.routed_experts is None
            path = completion.routed_experts_path
            completion.routed_experts = encode(await fetch_async(engine, path))
    return outputs


async def _pause_all(engine: Any, prompts: list[list[int]], prefix: str = "pause") -> list[Any]:
    started = [asyncio.Event() for _ in prompts]

    def note(event: asyncio.Event) -> Any:
        async def on_output(output: Any) -> None:
            if len(output.outputs[0].token_ids) >= ABORT_AFTER_TOKENS:
                event.set()

        return on_output

    running = [
        asyncio.create_task(_last_output(engine, f"{prefix}-{i}", prompt, note(event)))
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

    settings = {**SETTINGS, "skip_tokenizer_init": False}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **settings))
    prompts, _ = workload(16, seed=9)
    try:
        return {
            "aborted": _rollouts(await _abort_each(engine, prompts)),
            "aborted without rows": _rollouts(await _abort_each_without_rows(engine, prompts)),
            "paused": _rollouts(await _pause_all(engine, prompts)),
            "aborted, fetched": _rollouts(
                await _fetched(engine, await _abort_each(engine, prompts, "fetch-abort"))
            ),
            "paused, fetched": _rollouts(
                await _fetched(engine, await _pause_all(engine, prompts, "fetch-pause"))
            ),
            "afterwards": _rollouts(
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


@pytest.mark.parametrize("group", ["aborted", "paused", "aborted, fetched", "paused, fetched"])
def test_a_request_ended_early_returns_the_rows_of_the_tokens_it_returns(
    rollouts: dict[str, list[Rollout]], group: str, oracle: TransformersOracle
) -> None:
    assert len(rollouts[group]) == 32
    assert {r.finish_reason for r in rollouts[group]} == {"abort"}
    assert {r.prompt_start == len(r.prompt) for r in rollouts[group]} == {True, False}
    assert all(0 < len(r.output) < 150 for r in rollouts[group])
    assert oracle.agreement(rollouts[group]).differing == 0


def test_an_abort_whose_rows_cannot_be_fetched_is_an_abort_all_the_same(
    rollouts: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    lost = rollouts["aborted without rows"]
    assert {r.finish_reason for r in lost} == {"abort"}
    assert all(0 < len(r.output) < 150 for r in lost)
    arrived = [r for r in lost if _leaves_in_parts(r.request)]
    assert all(r.routed is None for r in lost if not _leaves_in_parts(r.request))
    assert oracle.agreement(arrived).differing == 0


def test_the_engine_serves_on_after_aborts_and_a_pause(
    rollouts: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    assert {r.finish_reason for r in rollouts["afterwards"]} == {"length"}
    assert oracle.agreement(rollouts["afterwards"]).differing == 0
