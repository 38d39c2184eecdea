"""Requests that are not a prompt of tokens and a length: embeddings, grammars, beams, logprobs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import generate, start_engine
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, from_outputs, random_prompts
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import TransformersOracle

KINDS: dict[str, dict[str, Any]] = {
    "prompt logprobs": {"prompt_logprobs": 2},
    "prompt logprobs again": {"prompt_logprobs": 2},
    "the same prompts": {},
    "logprobs": {"logprobs": 3},
    "min_tokens": {"min_tokens": 6, "logit_bias": {257: 100.0}},
    "logit bias": {"logit_bias": {97: 100.0}, "ignore_eos": True},
    "repetition penalty": {"repetition_penalty": 1.5},
}


def _run(model: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    llm = start_engine(
        model,
        skip_tokenizer_init=False,
        enable_prompt_embeds=True,
        max_num_batched_tokens=96,
        num_gpu_blocks_override=40,
    )
    hook = RouterHook(llm)
    rng = np.random.default_rng(31)
    prompts = random_prompts(rng, [1, 1, 2, 31, 32, 33, 64, 65, 90, 120])

    def ask(prompts: list[list[int]], **options: Any) -> list[Rollout]:
        params = [SamplingParams(max_tokens=10, detokenize=False, **options) for _ in prompts]
        return hook.attach_to(generate(llm, prompts, params))

    found = {name: ask(prompts, **options) for name, options in KINDS.items()}
    grammar = StructuredOutputsParams(regex="[a-c]{4,8}")
    found["grammar"] = ask(prompts, structured_outputs=grammar)
    llm.beam_search(
        [{"prompt_token_ids": prompt} for prompt in prompts[:4]],
        BeamSearchParams(beam_width=3, max_tokens=5),
    )
    found["after a beam search"] = ask(prompts)

    embeddings = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    embedded = llm.generate(
        [{"prompt_embeds": embeddings[torch.tensor(prompt)]} for prompt in prompts[2:]],
        SamplingParams(max_tokens=10, detokenize=False),
        use_tqdm=False,
    )
    found["embeddings"] = from_outputs(embedded)
    for rollout, prompt in zip(found["embeddings"], prompts[2:], strict=True):
        rollout.prompt = prompt  # vLLM reports zeros
    return found


@pytest.fixture(scope="module")
def run(moe_model: Path) -> dict[str, Any]:
    return run_in_engine_process(_run, moe_model)


@pytest.mark.parametrize("kind", [*KINDS, "grammar", "after a beam search", "embeddings"])
def test_rows_are_those_of_transformers(
    run: dict[str, Any], kind: str, oracle: TransformersOracle
) -> None:
    assert oracle.agreement(run[kind]).differing == 0


@pytest.mark.parametrize("kind", [*KINDS, "grammar", "after a beam search"])
def test_rows_are_the_routers_own_in_order(run: dict[str, Any], kind: str) -> None:
    assert sum(rollout.ordered_differences() for rollout in run[kind]) == 0


def test_prompt_logprobs_compute_prompts_that_the_prefix_cache_holds(run: dict[str, Any]) -> None:
    assert sum(rollout.num_cached for rollout in run["prompt logprobs again"]) == 0
    assert sum(rollout.num_cached > 0 for rollout in run["the same prompts"]) >= 4
