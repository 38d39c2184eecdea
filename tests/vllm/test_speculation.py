"""N-gram speculation: drafts are fed, some are rejected, and only kept tokens have rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import NGRAM_SPECULATION, generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import TransformersOracle


def _run(model: Path) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.v1.engine.output_processor import OutputProcessor

    llm = start_engine(
        model,
        speculative_config=NGRAM_SPECULATION,
        num_gpu_blocks_override=24,
        skip_tokenizer_init=False,
        worker_cls="tests.vllm.rigs.workers.SpeculatingWorker",
    )
    hook = RouterHook(llm)
    prompts, params = workload(120, seed=9, max_tokens=40)
    # Few letters, so that the drafter finds repetitions and guesses some of them right.
    prompts = [[token % 3 for token in prompt] for prompt in prompts]
    for param in params[::2]:
        param.allowed_token_ids = [0, 1, 2]
    scheduler = hook.scheduler
    drafted, update = [], scheduler.make_spec_decoding_stats

    def make_spec_decoding_stats(*args: Any, **kwargs: Any) -> Any:
        drafted.append((kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"]))
        return update(*args, **kwargs)

    scheduler.make_spec_decoding_stats = make_spec_decoding_stats
    rollouts = hook.attach_to(generate(llm, prompts, params))
    letters = llm.get_tokenizer().convert_tokens_to_ids(list("ab"))
    # One letter or two, so that drafts are accepted and stop strings end within a step.
    stopping = [
        SamplingParams(
            temperature=1.0, max_tokens=60, allowed_token_ids=letters[:kinds], stop=["aaba", "aaa"]
        )
        for kinds in (1, 2)
    ]
    trimmed, trim = [], getattr(OutputProcessor, "_trim_surplus_tokens", None)

    def trim_surplus_tokens(state: Any, output: Any, *args: Any) -> None:
        before = len(output.new_token_ids)
        trim(state, output, *args)
        trimmed.append(before - len(output.new_token_ids))

    OutputProcessor._trim_surplus_tokens = staticmethod(trim_surplus_tokens)
    prompts = [
        [letters[token % (1 + index % 2)] for token in prompt]
        for index, prompt in enumerate(prompts * 2)
    ]
    stopped = hook.attach_to(generate(llm, prompts, stopping * (len(prompts) // 2)))
    return {
        "rollouts": rollouts + stopped,
        "stopped": stopped,
        "trimmed": trimmed if trim else None,
        "drafted": np.array(drafted).sum(0).tolist(),
    }


@pytest.fixture(scope="module")
def run(moe_model: Path) -> dict[str, Any]:
    return run_in_engine_process(_run, moe_model)


def test_drafts_were_accepted_and_rejected_and_requests_preempted(run: dict[str, Any]) -> None:
    drafts, accepted = run["drafted"]
    assert accepted >= 50
    assert drafts - accepted >= 50
    assert sum(r.num_preemptions > 0 for r in run["rollouts"]) >= 5


def test_stop_strings_that_end_within_a_step_leave_as_many_rows_as_tokens(
    run: dict[str, Any],
) -> None:
    assert sum(isinstance(r.stop_reason, str) for r in run["stopped"]) >= 60
    for rollout in run["stopped"]:
        rollout.check_form()


def test_tokens_behind_a_stop_string_were_cut_off(run: dict[str, Any]) -> None:
    if run["trimmed"] is None:
        pytest.skip("before 0.32 vLLM returns the tokens behind a stop string")
    assert sum(number > 0 for number in run["trimmed"]) >= 1


def test_rows_are_the_routers_own_in_order(run: dict[str, Any]) -> None:
    assert sum(r.ordered_differences() for r in run["rollouts"]) == 0


def test_rows_are_those_of_transformers(run: dict[str, Any], oracle: TransformersOracle) -> None:
    assert oracle.agreement(run["rollouts"]).differing == 0
