"""Speculation by a model or a layer that has experts too: its routers and the target's do not meet.

The draft model has the layer numbers of the target, the predictor's layer has the next one.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import generate, start_engine, workload
from .rigs.engine_process import run_in_engine_process
from .rigs.mtp_model import MTP_LAYER, make_mtp
from .rigs.mtp_model import SHAPE as MTP_SHAPE
from .rigs.router_hook import RouterHook
from .rigs.tiny_models import QWEN3_MOE, Shape
from .rigs.transformers_oracle import TransformersOracle


def _run(model: Path, shape: Shape, speculation: dict[str, Any]) -> dict[str, Any]:
    llm = start_engine(model, speculative_config={**speculation, "num_speculative_tokens": 3})
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
    for rollout in rollouts:
        rollout.shape = shape
    return {"rollouts": rollouts, "drafted": np.array(drafted).sum(0).tolist(), "calls": calls}


def _count_calls(drafter: Any) -> dict[int, int]:
    """How often each router that drafts has run, by its decoder layer."""
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
def mtp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp(tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module", params=["draft model", "multi-token prediction"])
def run(request: pytest.FixtureRequest, moe_model: Path, mtp_model: Path) -> dict[str, Any]:
    if request.param == "draft model":
        model, shape, layers = moe_model, QWEN3_MOE, QWEN3_MOE.moe_layers
        speculation = {"method": "draft_model", "model": str(moe_model)}
    else:
        model, shape, layers = mtp_model, MTP_SHAPE, (MTP_LAYER,)
        speculation = {"method": "mtp"}
    found = run_in_engine_process(_run, model, shape, speculation)
    return {**found, "model": model, "layers": layers}


def test_the_drafting_routers_ran_and_drafts_were_accepted_and_rejected(
    run: dict[str, Any],
) -> None:
    assert sorted(run["calls"]) == list(run["layers"])
    assert all(count > 100 for count in run["calls"].values())
    drafts, accepted = run["drafted"]
    assert accepted >= 20
    assert drafts - accepted >= 50


def test_rows_are_those_of_the_targets_routers(run: dict[str, Any]) -> None:
    assert sum(r.ordered_differences() for r in run["rollouts"]) == 0
    assert TransformersOracle(run["model"]).agreement(run["rollouts"]).differing == 0
