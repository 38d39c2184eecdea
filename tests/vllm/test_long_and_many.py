"""Prompts of two thousand tokens, and three hundred requests in one batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import generate, start_engine
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, random_prompts
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import TransformersOracle

LONG_PROMPTS = (2000, 1999, 2048, 1023)
CHUNK = 512
NUM_REQUESTS = 300


def _run(model: Path) -> dict[str, Any]:
    from vllm import SamplingParams

    llm = start_engine(
        model,
        max_model_len=2200,
        hf_overrides={"max_position_embeddings": 2200},
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=CHUNK,
    )
    hook = RouterHook(llm)
    rng = np.random.default_rng(12)
    running = []

    def note_running(step: int) -> None:
        running.append(len(hook.scheduler.running))

    def ask(prompt_lengths: Any, max_tokens: Any) -> list[Rollout]:
        params = [
            SamplingParams(temperature=1.0, max_tokens=int(n), ignore_eos=True, detokenize=False)
            for n in max_tokens
        ]
        prompts = random_prompts(rng, prompt_lengths)
        return hook.attach_to(generate(llm, prompts, params, note_running))

    return {
        "long": ask(LONG_PROMPTS, [20] * len(LONG_PROMPTS)),
        "chunks": hook.chunked_prefills,
        # The shortest output takes longer than the prompts of all others.
        "many": ask(rng.integers(1, 40, NUM_REQUESTS), rng.integers(30, 50, NUM_REQUESTS)),
        "most_running": max(running),
    }


@pytest.fixture(scope="module")
def run(moe_model: Path) -> dict[str, Any]:
    return run_in_engine_process(_run, moe_model)


def test_long_prompts_came_in_chunks_and_all_requests_ran_at_once(run: dict[str, Any]) -> None:
    assert [len(rollout.prompt) for rollout in run["long"]] == list(LONG_PROMPTS)
    assert run["chunks"] >= sum(LONG_PROMPTS) // CHUNK - len(LONG_PROMPTS)
    assert run["most_running"] == NUM_REQUESTS


@pytest.mark.parametrize("group", ["long", "many"])
def test_rows_are_the_routers_own_in_order(run: dict[str, Any], group: str) -> None:
    assert sum(rollout.ordered_differences() for rollout in run[group]) == 0


@pytest.mark.parametrize("group", ["long", "many"])
def test_rows_are_those_of_transformers(
    run: dict[str, Any], group: str, oracle: TransformersOracle
) -> None:
    assert oracle.agreement(run[group]).differing == 0
