"""Rows that are fetched after a request has ended, beside those of its twin in the response."""

from pathlib import Path
from typing import Any

import pytest

from shared_schema import to_vllm_native

from .rigs.engine import SETTINGS, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout
from .rigs.transformers_oracle import TransformersOracle

SMALL_KV_BLOCKS = 14


def _with(params: list[Any], **extra: Any) -> list[Any]:
    for param in params:
        param.extra_args = {f"r3_{key}": value for key, value in extra.items()}
    return params


def _rollouts(llm: Any, outputs: list[Any]) -> list[Rollout]:
    """As fetched; None where a row is unrecorded."""
    from vllm_r3_plugin import fetch

    found = []
    for output in outputs:
        for completion in output.outputs:
            assert completion.routed_experts is None
            routed = fetch(llm, completion.routed_experts_path)
            assert routed == fetch(llm, completion.routed_experts_path)
            found.append(
                Rollout(
                    request=output.request_id,
                    index=completion.index,
                    prompt=list(output.prompt_token_ids),
                    output=list(completion.token_ids),
                    routed=to_vllm_native(routed) if routed.is_complete else None,
                    finish_reason=completion.finish_reason,
                    stop_reason=completion.stop_reason,
                    prompt_start=routed.token_start,
                )
            )
    return found


def _under_pressure(model: Path) -> dict[str, Any]:
    """Shared prefixes, preemption and a cache that evicts; all is fetched only at the end."""
    from vllm import LLM

    llm = LLM(str(model), **SETTINGS, num_gpu_blocks_override=SMALL_KV_BLOCKS)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt, counts = scheduler._preempt_request, {"preempted": 0}

    def counting(*args: Any, **kwargs: Any) -> Any:
        counts["preempted"] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counting
    outputs = []
    for seed in range(3):
        prompts, params = workload(24, seed=seed, max_tokens=80)
        _with(params, delivery="fetch", encoding="r3")
        outputs += llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    held = len(scheduler.r3_held), scheduler.r3_held.num_bytes, scheduler.r3_store.nbytes
    return {"rollouts": _rollouts(llm, outputs), "held": held, **counts}


@pytest.fixture(scope="module")
def pressed(moe_model: Path) -> dict[str, Any]:
    return run_in_engine_process(_under_pressure, moe_model)


def test_fetched_rows_are_those_of_transformers_under_preemption_and_eviction(
    pressed: dict[str, Any], oracle: TransformersOracle
) -> None:
    assert pressed["preempted"] > 0
    assert len(pressed["rollouts"]) == 72
    assert all(rollout.routed is not None for rollout in pressed["rollouts"])
    assert oracle.agreement(pressed["rollouts"]).differing == 0


def test_what_is_held_is_counted(pressed: dict[str, Any]) -> None:
    number, held_nbytes, store_nbytes = pressed["held"]
    assert number == 72
    assert held_nbytes > 0
    # Requests share pages, which count for each of them.
    assert store_nbytes < held_nbytes + 8 * SETTINGS["block_size"] * SMALL_KV_BLOCKS * 12
