"""Speculation by a draft model that has experts too: its routers and the target's do not meet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.router_hook import RouterHook
from .rigs.tiny_models import MOE_LAYERS
from .rigs.transformers_oracle import TransformersOracle


def _run(model: Path) -> dict[str, Any]:
    drafts = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    llm = start_engine(model, speculative_config=drafts)
    hook = RouterHook(llm)
    calls = _count_calls(hook.runner.drafter.model)
    prompts, params = workload(60, seed=9, max_tokens=30)
    for param in params[::2]:
        param.temperature = 0.0
    scheduler = hook.scheduler
    drafted, update = [], scheduler.make_spec_decoding_stats

    def make_spec_decoding_stats(*args: Any, **kwargs: Any) -> Any:
        drafted.append((kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"]))
        return update(*args, **kwargs)

    scheduler.make_spec_decoding_stats = make_spec_decoding_stats
    rollouts = hook.attach_to(generate(llm, prompts, params))
    return {"rollouts": rollouts, "drafted": np.array(drafted).sum(0).tolist(), "calls": calls}


def _count_calls(drafter: Any) -> dict[int, int]:
    """How often each router of the draft model has run, by its decoder layer."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    calls: dict[int, int] = {}

    def count(layer: int, compute: Any) -> Any:
        def compute_routing(*args: Any, **kwargs: Any) -> Any:
            calls[layer] += 1
            return compute(*args, **kwargs)

        return compute_routing

    for module in drafter.modules():
        if isinstance(module, MoERunner):
            calls[module.layer_id] = 0
            module.router._compute_routing = count(module.layer_id, module.router._compute_routing)
    return calls


@pytest.fixture(scope="module")
def run(moe_model: Path) -> dict[str, Any]:
    return run_in_engine_process(_run, moe_model)


def test_the_draft_models_routers_ran_on_the_same_layers_and_drafts_were_rejected(
    run: dict[str, Any],
) -> None:
    assert sorted(run["calls"]) == list(MOE_LAYERS)
    assert all(count > 100 for count in run["calls"].values())
    drafts, accepted = run["drafted"]
    assert accepted >= 20
    assert drafts - accepted >= 50


def test_rows_are_those_of_the_targets_routers(
    run: dict[str, Any], oracle: TransformersOracle
) -> None:
    assert sum(r.ordered_differences() for r in run["rollouts"]) == 0
    assert oracle.agreement(run["rollouts"]).differing == 0
