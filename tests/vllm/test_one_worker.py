"""More than a thousand requests on one eager V1 worker, ended in every way that there is."""

import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.lost_payloads import losing_payloads
from .rigs.rollouts import Rollout, random_prompts
from .rigs.router_hook import RouterHook
from .rigs.tiny_models import EOS_TOKEN_ID
from .rigs.transformers_oracle import TransformersOracle


def _ends(letters: list[int]) -> dict[str, dict[str, Any]]:
    """Sampling parameters for each way to end; the sampler may choose few tokens only."""
    return {
        "length": {"max_tokens": 12},
        "max_tokens=1": {"max_tokens": 1},
        "EOS": {"max_tokens": 60, "allowed_token_ids": [EOS_TOKEN_ID, *letters]},
        "stop token": {
            "max_tokens": 60,
            "allowed_token_ids": letters,
            "stop_token_ids": letters[:1],
        },
        "stop string": {
            "max_tokens": 120,
            "allowed_token_ids": letters,
            "stop": ["ab", "cba"],
            "detokenize": True,
        },
        "stop string kept": {
            "max_tokens": 120,
            "allowed_token_ids": letters,
            "stop": ["ab"],
            "include_stop_str_in_output": True,
            "detokenize": True,
        },
        "n=3": {"max_tokens": 10, "n": 3},
        "n=2 with stop string": {
            "max_tokens": 120,
            "n": 2,
            "allowed_token_ids": letters,
            "stop": ["ab"],
            "detokenize": True,
        },
    }


class Message(NamedTuple):
    """What one step sent to the front end."""

    ends: int
    arrays: int
    frames: int


@contextmanager
def _messages(scheduler: Any) -> Iterator[list[Message]]:
    from vllm.v1.serial_utils import MsgpackEncoder

    messages: list[Message] = []
    encoder, update = MsgpackEncoder(), scheduler.update_from_output

    def update_from_output(*args: Any) -> Any:
        outputs = update(*args)
        for sent in outputs.values():
            messages.append(
                Message(
                    sum(output.finished for output in sent.outputs),
                    sum(output.routed_experts is not None for output in sent.outputs),
                    len(encoder.encode(sent)),
                )
            )
        return outputs

    scheduler.update_from_output = update_from_output
    try:
        yield messages
    finally:
        scheduler.update_from_output = update


def _run(model: Path) -> dict[str, Any]:
    from vllm import SamplingParams

    llm = start_engine(
        model, skip_tokenizer_init=False, max_num_seqs=128, max_num_batched_tokens=192
    )
    hook = RouterHook(llm)
    rng = np.random.default_rng(0)
    letters = llm.get_tokenizer().convert_tokens_to_ids(list(string.ascii_lowercase[:3]))
    with _messages(hook.scheduler) as messages:
        groups = {"random": hook.attach_to(generate(llm, *workload(800, seed=0)))}
    ends = _ends(letters)
    for name, how in ends.items():
        prompts = random_prompts(rng, rng.integers(1, 60, 24))
        params = [SamplingParams(temperature=1.0, **{"detokenize": False, **how})] * len(prompts)
        groups[name] = hook.attach_to(generate(llm, prompts, params))
    prompts = random_prompts(rng, rng.integers(1, 60, 60))
    starts = [0, 1, *(int(rng.integers(0, len(p) + 1)) for p in prompts[2:-1]), len(prompts[-1])]
    groups["prompt start"] = hook.attach_to(
        generate(
            llm,
            prompts,
            [
                SamplingParams(max_tokens=8, detokenize=False, routed_experts_prompt_start=start)
                for start in starts
            ],
        )
    )
    lossy = SamplingParams(temperature=1.0, **ends["stop string"])
    with losing_payloads(0.05):
        lost = generate(llm, random_prompts(rng, [30] * 60), [lossy] * 60)
    counters = {"mixed": hook.mixed_steps, "chunked": hook.chunked_prefills, "hits": hook.hits}
    return {
        "groups": groups,
        "counters": counters,
        "lossy": hook.attach_to(lost),
        "messages": messages,
    }


@pytest.fixture(scope="module")
def run(moe_model: Path) -> dict[str, Any]:
    return run_in_engine_process(_run, moe_model)


@pytest.fixture(scope="module")
def rollouts(run: dict[str, Any]) -> list[Rollout]:
    return [rollout for group in run["groups"].values() for rollout in group]


def test_batches_mixed_prefill_with_decode_chunked_prompts_and_hit_the_prefix_cache(
    run: dict[str, Any],
) -> None:
    assert run["counters"]["mixed"] >= 20
    assert run["counters"]["chunked"] >= 20
    assert run["counters"]["hits"] >= 20


def test_a_thousand_requests_route_as_in_transformers(
    rollouts: list[Rollout], oracle: TransformersOracle
) -> None:
    assert len(rollouts) >= 1000
    agreement = oracle.agreement(rollouts)
    assert agreement.differing == 0
    assert agreement.ties < agreement.decisions / 1000


def test_every_row_is_the_routers_own_in_order(rollouts: list[Rollout]) -> None:
    assert sum(rollout.ordered_differences() for rollout in rollouts) == 0


def test_a_step_in_which_no_request_ends_sends_what_it_would_without_routing(
    run: dict[str, Any],
) -> None:
    """One frame, no rows; the rows of a request leave once, with its last output."""
    messages = run["messages"]
    assert sum(message.ends == 0 for message in messages) >= 5
    assert sum(message.arrays for message in messages) == 800
    for message in messages:
        assert message.arrays == message.ends
        assert message.frames == 1 or message.ends


def test_completions_of_one_prompt_each_carry_their_whole_sequence(run: dict[str, Any]) -> None:
    samples = run["groups"]["n=3"]
    assert {rollout.index for rollout in samples} == {0, 1, 2}
    for rollout in samples:
        rollout.check_form()


def test_prompt_start_leaves_out_that_many_rows(run: dict[str, Any]) -> None:
    started = run["groups"]["prompt start"]
    assert {r.prompt_start for r in started} >= {0, 1}
    assert any(r.prompt_start == len(r.prompt) for r in started)
    for rollout in started:
        rollout.check_form()


def test_max_tokens_1_returns_one_row_for_each_prompt_token(run: dict[str, Any]) -> None:
    for rollout in run["groups"]["max_tokens=1"]:
        assert rollout.routed is not None
        assert len(rollout.routed) == len(rollout.prompt)


@pytest.mark.parametrize(
    ("group", "stop_reason"),
    [("EOS", type(None)), ("stop token", int), ("stop string", str), ("stop string kept", str)],
)
def test_stopped_requests_keep_their_rows(
    run: dict[str, Any], group: str, stop_reason: type
) -> None:
    stopped = [r for r in run["groups"][group] if r.finish_reason == "stop"]
    assert len(stopped) >= 12
    for rollout in stopped:
        assert isinstance(rollout.stop_reason, stop_reason)
        rollout.check_form()


def test_rows_sent_in_parts_are_withdrawn_when_one_part_is_lost(run: dict[str, Any]) -> None:
    returned = [r for r in run["lossy"] if r.routed is not None]
    assert 0 < len(returned) < len(run["lossy"])
    assert sum(rollout.ordered_differences() for rollout in returned) == 0
