"""A prefill engine and a decode engine that share KV: each returns its own rows, spliced to one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_schema import (
    RoutingLayout,
    RoutingSchemaError,
    RowStatus,
    decode,
    from_vllm_native,
    splice,
)

from .rigs.engine import generate, start_engine
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import random_prompts
from .rigs.transformers_oracle import TransformersOracle, compare_sets

LAYOUT = RoutingLayout(num_experts=32, top_k=4, moe_layers=(1, 2, 3), num_hidden_layers=4)
PROMPTS = random_prompts(np.random.default_rng(0), [40, 64, 97, 150])


def _greedy(llm: Any, max_tokens: int, options: list[dict[str, Any]]) -> list[Any]:
    """What each request returns as its routed experts, and its tokens."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=max_tokens, detokenize=False, extra_args=extra_args
        )
        for extra_args in options
    ]
    return [(r.routed, r.tokens) for r in generate(llm, PROMPTS, params)]


def _run(model: Path, folder: Path, phase: str) -> dict[str, Any]:
    from .rigs.disk_connector import DiskConnector, kv_transfer_config

    llm = start_engine(model, kv_transfer_config=kv_transfer_config(folder))
    encoded = {"r3_encoding": "r3"}
    if phase == "prefill":
        return {
            "prompt half": _greedy(llm, 1, [encoded] * 4),
            "whole": _greedy(llm, 12, [encoded] * 4),
        }
    starts = [{"r3_start": len(prompt)} for prompt in PROMPTS]
    num_loaded = DiskConnector.num_loaded
    return {
        "both halves": _greedy(llm, 12, [encoded] * 4),
        "num_loaded": DiskConnector.num_loaded - num_loaded,
        "output half": _greedy(llm, 12, starts),
    }


@pytest.fixture(scope="module")
def engines(moe_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kv")
    env = {"PYTHONHASHSEED": "0"}  # both engines must hash the same tokens alike
    return {
        phase: run_in_engine_process(_run, moe_model, folder, phase, env=env)
        for phase in ("prefill", "decode")
    }


def test_the_halves_splice_to_the_rows_of_one_engine(
    engines: dict[str, Any], oracle: TransformersOracle
) -> None:
    prefill, decoding = engines["prefill"], engines["decode"]
    for prompt_half, output_half, whole in zip(
        prefill["prompt half"], decoding["output half"], prefill["whole"], strict=True
    ):
        start = len(prompt_half[1]) - 1
        assert output_half[1] == whole[1]
        output_rows = from_vllm_native(output_half[0], LAYOUT, token_start=start)
        spliced = splice(decode(prompt_half[0]), output_rows)
        assert spliced == decode(whole[0])
        (logits,) = oracle.router_logits([whole[1][:-1]])
        assert compare_sets(spliced.ids, logits).differing == 0


def test_the_decode_engine_says_which_prompt_rows_it_did_not_compute(
    engines: dict[str, Any],
) -> None:
    prefill, decoding = engines["prefill"], engines["decode"]
    num_loaded = [(len(prompt) - 1) // 32 * 32 for prompt in PROMPTS]
    assert decoding["num_loaded"] == sum(num_loaded)
    for prompt_half, both_halves, whole, num in zip(
        prefill["prompt half"], decoding["both halves"], prefill["whole"], num_loaded, strict=True
    ):
        half = decode(both_halves[0])
        assert (half.status[:num] == RowStatus.NOT_COMPUTED_HERE).all()
        assert not half.status[num:].any()
        assert splice(decode(prompt_half[0]), half) == decode(whole[0])


def test_halves_of_different_requests_do_not_splice(engines: dict[str, Any]) -> None:
    prompt_half = engines["prefill"]["prompt half"][1]
    with pytest.raises(RoutingSchemaError):
        splice(decode(prompt_half[0]), decode(engines["decode"]["both halves"][0][0]))
