"""LoRA: two adapters and the bare model side by side in one batch, on the same prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import SETTINGS
from .rigs.engine_process import run_in_engine_process
from .rigs.lora_adapters import RANK, make_adapter
from .rigs.rollouts import Rollout, from_outputs, random_prompts
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import TransformersOracle

TARGETS = ("q_proj", "v_proj", "o_proj", "gate")


def _keep_the_cpu_kernel() -> None:
    """vLLM chooses a Triton kernel when LoRA is on, on CPU too, where there is none.

    Adapters here leave the experts alone, so the kernel need not know of them.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method

    select = method.select_unquantized_moe_backend
    method.select_unquantized_moe_backend = lambda moe_config: select(
        replace(moe_config, is_lora_enabled=False)
    )


def _run(model: Path, adapters: dict[str, Path]) -> dict[str, list[Rollout]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    _keep_the_cpu_kernel()
    llm = LLM(
        str(model),
        enable_lora=True,
        max_lora_rank=RANK,
        # vLLM's CPU kernels give requests without an adapter the last slot's: let it be empty.
        max_loras=len(adapters) + 1,
        lora_target_modules=["qkv_proj", "o_proj", "gate"],
        **SETTINGS,
    )
    hook = RouterHook(llm)
    requests = {
        name: LoRARequest(name, number, str(path))
        for number, (name, path) in enumerate(adapters.items(), start=1)
    }
    rng = np.random.default_rng(20)
    shared = random_prompts(rng, [70])[0]
    prompts = [shared + own for own in random_prompts(rng, rng.integers(1, 40, 16))]
    params = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True, detokenize=False)
    found: dict[str, list[Rollout]] = {name: [] for name in ("base", *adapters)}
    for _ in range(2):  # the second time behind the prefix cache
        names = [name for name in found for _ in prompts]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for _ in found for prompt in prompts],
            params,
            lora_request=[requests.get(name) for name in names],
            use_tqdm=False,
        )
        for name, rollout in zip(names, hook.attach_to(from_outputs(outputs)), strict=True):
            found[name].append(rollout)
    return found


@pytest.fixture(scope="module")
def models(moe_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Adapter and merged model by name."""
    folder = tmp_path_factory.mktemp("lora")
    return {
        name: make_adapter(folder / name, moe_model, seed, TARGETS)
        for seed, name in enumerate(("first", "second"))
    }


@pytest.fixture(scope="module")
def rollouts(moe_model: Path, models: dict[str, Any]) -> dict[str, list[Rollout]]:
    adapters = {name: adapter for name, (adapter, _) in models.items()}
    return run_in_engine_process(_run, moe_model, adapters)


def test_rows_are_the_routers_own_in_order(rollouts: dict[str, list[Rollout]]) -> None:
    assert sum(r.ordered_differences() for found in rollouts.values() for r in found) == 0


def test_requests_with_an_adapter_return_the_routing_of_the_merged_model(
    rollouts: dict[str, list[Rollout]], models: dict[str, Any]
) -> None:
    for name, (_, merged) in models.items():
        assert sum(rollout.num_cached > 0 for rollout in rollouts[name]) >= 16
        assert TransformersOracle(merged).agreement(rollouts[name]).differing == 0


def test_requests_without_one_beside_them_return_the_routing_of_the_model(
    rollouts: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    assert oracle.agreement(rollouts["base"]).differing == 0


def test_adapters_do_change_the_routing(
    rollouts: dict[str, list[Rollout]], oracle: TransformersOracle
) -> None:
    assert oracle.agreement(rollouts["first"]).differing > 100
