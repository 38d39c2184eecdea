"""Sessions, in which one request takes several prompts, and conversations, on `AsyncLLM`."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import SETTINGS, force_async_scheduling
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, from_outputs, random_prompts
from .rigs.transformers_oracle import TransformersOracle

NUM_SESSIONS = 12
NUM_TURNS = 3
TURN_TOKENS = 9
MAX_LENGTH = 1000


def _params(max_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=1.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options
    )


async def _nothing(turn: int) -> None:
    """Done before each turn, unless asked otherwise."""


async def _session(
    engine: Any,
    name: str,
    prompts: list[list[int]],
    wait: bool = True,
    abort: bool = False,
    before_turn: Callable[[int], Awaitable[None]] = _nothing,
) -> list[Rollout]:
    """A resumable request: the prompts of all turns follow each other in one stream of input.

    With `wait` a turn's prompt is sent when the turn before has ended, otherwise all at once. With
    `abort` the last turn has no other end than the client's abort, when it has seen some of the
    turn's tokens. What a session holds after a turn is all that went in and came out, the last
    token of a turn left out where another turn follows.
    """
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind

    ended = asyncio.Event()
    params, endless = (
        _params(n, output_kind=RequestOutputKind.DELTA) for n in (TURN_TOKENS, MAX_LENGTH)
    )

    async def turns() -> AsyncIterator[Any]:
        for i, prompt in enumerate(prompts):
            if wait and i:
                await ended.wait()
                ended.clear()
            await before_turn(i)
            is_endless = abort and i == len(prompts) - 1
            yield StreamingInput(
                prompt={"type": "token", "prompt_token_ids": prompt},
                sampling_params=endless if is_endless else params,
            )

    found, tokens, output = [], list(prompts[0]), []
    async for part in engine.generate(turns(), params, name):
        completion = part.outputs[0]
        output += completion.token_ids
        if abort and len(found) == len(prompts) - 1 and completion.finish_reason is None:
            await engine.abort(name)
        if completion.finish_reason is not None:
            routed, reason = completion.routed_experts, completion.finish_reason
            found.append(Rollout(name, len(found), tokens, output, routed, reason))
            if len(found) < len(prompts):
                tokens, output = [*tokens, *output[:-1], *prompts[len(found)]], []
            ended.set()
    return found


async def _lossy_session(engine: Any, name: str, prompts: list[list[int]]) -> list[Rollout]:
    """A session by itself, whose second turn loses its rows on the way to the engine core."""

    async def before_turn(i: int) -> None:
        if i:
            await engine.collective_rpc("lose_payloads" if i == 1 else "keep_payloads")

    return await _session(engine, name, prompts, before_turn=before_turn)


async def _conversation(engine: Any, name: str, prompts: list[list[int]]) -> list[Rollout]:
    """A request for each turn; each asks for the rows that the turns before did not return."""
    from vllm.sampling_params import RequestOutputKind

    found: list[Rollout] = []
    tokens: list[int] = []
    for i, prompt in enumerate(prompts):
        start = max(0, len(tokens) - 1)
        params = _params(
            TURN_TOKENS,
            routed_experts_prompt_start=start,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        turn = {"prompt_token_ids": tokens + prompt}
        async for output in engine.generate(turn, params, f"{name}-{i}"):
            found += from_outputs([output], [start])
        tokens = found[-1].tokens
    return found


async def _behind(engine: Any, sessions: list[list[Rollout]]) -> list[list[Rollout]]:
    """Requests that hit the KV blocks of sessions, all of them."""
    from vllm.sampling_params import RequestOutputKind

    params = _params(1, output_kind=RequestOutputKind.FINAL_ONLY)
    found = []
    for session in sessions:
        prompt = {"prompt_token_ids": session[-1].tokens}
        async for output in engine.generate(prompt, params, f"behind {session[-1].request}"):
            found.append(from_outputs([output], [0]))
    return found


async def _scenario(model: Path) -> dict[str, list[list[Rollout]]]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings: dict[str, Any] = {
        **SETTINGS,
        "max_model_len": MAX_LENGTH,
        "worker_cls": "tests.vllm.rigs.workers.LossyWorker",
    }
    config = AsyncEngineArgs(model=str(model), **settings).create_engine_config()
    # The engine core need not import all again, which takes longer than the rest.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    rng = np.random.default_rng(12)

    async def each(run: Callable[..., Any], name: str, **how: Any) -> list[list[Rollout]]:
        turns = [random_prompts(rng, rng.integers(1, 60, NUM_TURNS)) for _ in range(NUM_SESSIONS)]
        return await asyncio.gather(
            *(run(engine, f"{name}-{i}", prompts, **how) for i, prompts in enumerate(turns))
        )

    try:
        waiting = await each(_session, "waiting")
        return {
            "waiting": waiting,
            "behind": await _behind(engine, waiting),
            "queued": await each(_session, "queued", wait=False),
            "aborted": await each(_session, "aborted", abort=True),
            "conversations": await each(_conversation, "talk"),
            "lossy": [
                await _lossy_session(engine, f"lossy-{i}", random_prompts(rng, [30, 40, 50]))
                for i in range(3)
            ],
        }
    finally:
        engine.shutdown()


def _run(model: Path) -> dict[bool, dict[str, list[list[Rollout]]]]:
    found = {False: asyncio.run(_scenario(model))}
    force_async_scheduling()
    return {**found, True: asyncio.run(_scenario(model))}


@pytest.fixture(scope="module")
def runs(moe_model: Path) -> dict[bool, dict[str, list[list[Rollout]]]]:
    return run_in_engine_process(_run, moe_model)


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def run(
    request: pytest.FixtureRequest, runs: dict[bool, dict[str, list[list[Rollout]]]]
) -> dict[str, list[list[Rollout]]]:
    return runs[request.param]


@pytest.mark.parametrize("group", ["waiting", "queued", "aborted"])
def test_every_turn_of_a_session_returns_the_rows_of_the_whole_session(
    run: dict[str, list[list[Rollout]]], group: str, oracle: TransformersOracle
) -> None:
    assert {len(session) for session in run[group]} == {NUM_TURNS}
    last = {session[-1].finish_reason for session in run[group]}
    assert last == {"abort" if group == "aborted" else "length"}
    turns = [turn for session in run[group] for turn in session]
    assert oracle.agreement(turns).differing == 0


def test_rows_of_a_session_serve_prefix_cache_hits(
    run: dict[str, list[list[Rollout]]], oracle: TransformersOracle
) -> None:
    behind = [rollout for (rollout,) in run["behind"]]
    for rollout, session in zip(behind, run["waiting"], strict=True):
        assert rollout.num_cached == (len(session[-1].tokens) - 1) // 32 * 32
    assert oracle.agreement(behind).differing == 0


def test_a_session_that_lost_rows_returns_none_from_then_on(
    run: dict[str, list[list[Rollout]]], oracle: TransformersOracle
) -> None:
    for session in run["lossy"]:
        assert [turn.routed is None for turn in session] == [False, True, True]
    assert oracle.agreement([session[0] for session in run["lossy"]]).differing == 0


def test_a_conversation_receives_each_row_once(
    run: dict[str, list[list[Rollout]]], oracle: TransformersOracle
) -> None:
    for turns in run["conversations"]:
        ids = np.concatenate([turn.moe_ids() for turn in turns])
        assert len(ids) == len(turns[-1].tokens) - 1
    turns = [turn for conversation in run["conversations"] for turn in conversation]
    assert sum(turn.num_cached > 0 for turn in turns) >= NUM_SESSIONS
    assert oracle.agreement(turns).differing == 0
