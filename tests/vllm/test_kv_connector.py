"""KV that a connector loads: rows computed here survive, others are unrecorded, none is stale."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import ROUTER_UPDATE, generate, start_engine
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, random_prompts
from .rigs.router_hook_by_prefix import RouterHookByPrefix
from .rigs.transformers_oracle import TransformersOracle

NUM_BLOCKS = 24
BLOCK_SIZE = 32


class _Engine:
    """An engine whose KV cache forgets soon; its connector and its routing store do not."""

    def __init__(self, model: Path, folder: Path) -> None:
        from .rigs.disk_connector import DiskConnector, kv_transfer_config

        self.llm = start_engine(
            model,
            num_gpu_blocks_override=NUM_BLOCKS,
            max_num_seqs=4,
            worker_extension_cls=ROUTER_UPDATE,
            kv_transfer_config=kv_transfer_config(folder),
            additional_config={"r3": {"max_bytes": 10_000_000}},
        )
        self.connector = DiskConnector
        self.journal = self.llm.llm_engine.engine_core.engine_core.scheduler.r3_journal
        self.rng = np.random.default_rng(0)

    def run(self, prompts: list[list[int]], prompt_start: int = 0) -> list[Rollout]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=6,
                detokenize=False,
                routed_experts_prompt_start=prompt_start,
            )
            for _ in prompts
        ]
        return generate(self.llm, prompts, params)

    def reload(self, prompts: list[list[int]], prompt_start: int = 0, **how: Any) -> list[Rollout]:
        """Push the prompts out of the KV cache and run them again; `how` sets the connector."""
        self.run(random_prompts(self.rng, [200] * 5))
        for name, value in how.items():
            setattr(self.connector, name, value)
        before = self.connector.num_loaded
        rollouts = self.run(prompts, prompt_start)
        assert self.connector.num_loaded >= before + BLOCK_SIZE * len(prompts)
        self.connector.loads_wait, self.connector.fails_at = False, None
        return rollouts


def _run(model: Path, other_model: Path, folder: Path) -> dict[str, Any]:
    engine = _Engine(model, folder)
    hook = RouterHookByPrefix(engine.llm)
    prompts = random_prompts(engine.rng, engine.rng.integers(70, 180, 12))
    attach = hook.attach_to
    phases = {
        "computed": attach(engine.run(prompts)),
        "loaded": attach(engine.reload(prompts)),
        "loaded while waiting": attach(engine.reload(prompts, loads_wait=True)),
        "load failed": attach(engine.reload(prompts, fails_at=1)),
        "load failed while waiting": attach(engine.reload(prompts, fails_at=1, loads_wait=True)),
    }
    # As in another engine: it holds no rows, the connector holds the KV.
    assert engine.llm.reset_prefix_cache()
    phases["elsewhere"] = engine.reload(prompts)
    reasons = dict(engine.journal.counts)
    phases["elsewhere, own rows"] = attach(engine.reload(prompts, prompt_start=70))
    phases["elsewhere, load failed"] = attach(engine.reload(prompts, fails_at=0))

    engine.llm.collective_rpc("load_routers", args=(str(other_model),))
    assert engine.llm.reset_prefix_cache()
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    for path in {scheduler.connector._paths(r)[0] for r in scheduler.connector._requests.values()}:
        path.unlink(missing_ok=True)
    phases["new weights"] = engine.run(prompts)
    phases["KV of old weights"] = engine.reload(prompts)

    assert engine.llm.reset_prefix_cache(reset_connector=True)
    phases["connector reset"] = engine.run(prompts)
    phases["loaded after the reset"] = engine.reload(prompts)
    return {"phases": phases, "reasons": reasons}


@pytest.fixture(scope="module")
def run(
    moe_model: Path, updated_moe_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kv")
    return run_in_engine_process(_run, moe_model, updated_moe_model, folder)


@pytest.mark.parametrize("phase", ["computed", "loaded", "loaded while waiting"])
def test_rows_computed_here_survive_the_reload_of_their_kv(
    run: dict[str, Any], phase: str, oracle: TransformersOracle
) -> None:
    rollouts = run["phases"][phase]
    assert oracle.agreement(rollouts).differing == 0
    assert sum(rollout.ordered_differences() for rollout in rollouts) == 0


@pytest.mark.parametrize(
    "phase", ["load failed", "load failed while waiting", "elsewhere, load failed"]
)
def test_rows_of_tokens_that_failed_to_load_are_those_of_the_recompute(
    run: dict[str, Any], phase: str, oracle: TransformersOracle
) -> None:
    rollouts = run["phases"][phase]
    assert oracle.agreement(rollouts).differing == 0
    assert sum(rollout.ordered_differences() for rollout in rollouts) == 0


def test_rows_that_this_engine_does_not_hold_are_unrecorded_with_the_reason(
    run: dict[str, Any],
) -> None:
    rollouts = run["phases"]["elsewhere"]
    assert [rollout.routed for rollout in rollouts] == [None] * len(rollouts)
    reasons = {name: n for name, n in run["reasons"].items() if name.startswith("INCOMPLETE")}
    assert reasons == {"INCOMPLETE_NOT_COMPUTED_HERE": len(rollouts)}


def test_the_requests_own_rows_are_returned_behind_loaded_ones(run: dict[str, Any]) -> None:
    rollouts = run["phases"]["elsewhere, own rows"]
    with_rows = [r for r in rollouts if r.routed is not None]
    assert len(with_rows) >= 2
    assert sum(rollout.ordered_differences() for rollout in with_rows) == 0


@pytest.mark.parametrize("phase", ["new weights", "connector reset", "loaded after the reset"])
def test_new_weights_route_as_in_transformers(
    run: dict[str, Any], phase: str, updated_moe_model: Path
) -> None:
    assert TransformersOracle(updated_moe_model).agreement(run["phases"][phase]).differing == 0


def test_kv_of_old_weights_that_outlived_a_reset_gets_no_rows_of_new_ones(
    run: dict[str, Any],
) -> None:
    rollouts = run["phases"]["KV of old weights"]
    assert [rollout.routed for rollout in rollouts] == [None] * len(rollouts)
