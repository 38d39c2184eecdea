"""Starts and drives the engine that the tests share: tiny model, float32, eager, capture on."""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .rollouts import Rollout, from_outputs, random_prompts

SETTINGS: dict[str, Any] = {
    "enable_return_routed_experts": True,
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "enforce_eager": True,
    "disable_log_stats": True,
    "seed": 0,
}

NGRAM_SPECULATION: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}

# Runs modes and models that cost minutes and that others cover in part.
ALL_MODES = bool(os.environ.get("MOE_R3_ALL_MODES"))

ROUTER_UPDATE = "tests.vllm.rigs.workers.RouterUpdate"

_request_ids = itertools.count()


def start_engine(model: Path, **overrides: Any) -> Any:
    """An offline `LLM`; `overrides` are its keyword arguments."""
    from vllm import LLM

    return LLM(str(model), **{**SETTINGS, **overrides})


def force_async_scheduling() -> None:
    """Schedule the next batch while one is in flight, which vLLM's CPU platform switches off.

    To be called before the engine is configured. Two batches are then in flight at once.
    """
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        config.scheduler_config.async_scheduling = True
        return config

    EngineArgs.create_engine_config = create_engine_config


def workload(count: int, seed: int, max_tokens: int = 24) -> tuple[list[list[int]], list[Any]]:
    """Prompts of 1 to 90 tokens, a third behind a common prefix; 1 to `max_tokens` are asked."""
    from vllm import SamplingParams

    rng = np.random.default_rng(seed)
    prefix = random_prompts(rng, [70])[0]
    prompts = [
        (prefix + prompt[:20]) if i % 3 == 0 else prompt
        for i, prompt in enumerate(random_prompts(rng, rng.integers(1, 90, count)))
    ]
    return prompts, [
        SamplingParams(temperature=1.0, max_tokens=int(n), detokenize=False)
        for n in rng.integers(1, max_tokens + 1, count)
    ]


def generate(
    llm: Any,
    prompts: Sequence[list[int]],
    params: Sequence[Any],
    between_steps: Callable[[int], None] = lambda step: None,
) -> list[Rollout]:
    """Run all requests to their end; `between_steps(n)` is called before step n, from 0."""
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    for prompt, param in zip(prompts, params, strict=True):
        param.output_kind = RequestOutputKind.FINAL_ONLY
        engine.add_request(str(next(_request_ids)), {"prompt_token_ids": prompt}, param)
    finished, step = [], 0
    while engine.has_unfinished_requests():
        between_steps(step)
        finished += [output for output in engine.step() if output.finished]
        step += 1
    finished.sort(key=lambda output: int(output.request_id))
    return from_outputs(finished, [p.routed_experts_prompt_start for p in params])
