"""New weights on a live engine, with and without a reset; rows belong to the KV that was used."""

from pathlib import Path

import numpy as np
import pytest

from .rigs.engine import ROUTER_UPDATE, generate, start_engine
from .rigs.engine_process import run_in_engine_process
from .rigs.rollouts import Rollout, random_prompts
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import TransformersOracle

BLOCK_SIZE = 32
PAGE_BYTES = BLOCK_SIZE * 3 * 4
# A store that soon forgets, beside a KV cache that does not.
NUM_PAGES = 16


class _Engine:
    def __init__(self, model: Path, other_model: Path) -> None:
        self.llm = start_engine(
            model,
            additional_config={"r3": {"max_bytes": NUM_PAGES * PAGE_BYTES}},
            worker_extension_cls=ROUTER_UPDATE,
        )
        self.hook = RouterHook(self.llm)
        self.rng = np.random.default_rng(0)
        self.weights = [other_model, model]

    def run(self, prompt: list[int], prompt_start: int = 0) -> Rollout:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=6, detokenize=False, routed_experts_prompt_start=prompt_start
        )
        (rollout,) = self.hook.attach_to(generate(self.llm, [prompt], [params]))
        return rollout

    def swap_weights(self) -> None:
        self.llm.collective_rpc("load_routers", args=(str(self.weights[0]),))
        self.weights.reverse()

    def continuation(self, prompt: list[int]) -> list[int]:
        return prompt + random_prompts(self.rng, [20])[0]

    def forget_pages(self) -> None:
        for prompt in random_prompts(self.rng, [60] * NUM_PAGES):
            self.run(prompt)


def _run(model: Path, other_model: Path) -> dict[str, Rollout]:
    engine = _Engine(model, other_model)
    (prompt,) = random_prompts(engine.rng, [3 * BLOCK_SIZE])
    found = {"old weights": engine.run(prompt)}
    engine.swap_weights()
    found["hit on KV of old weights"] = engine.run(engine.continuation(prompt))
    # The whole prompt is cached, so its last block is computed again, in another KV block.
    found["last block computed twice"] = engine.run(prompt)
    found["hit on the first of two blocks"] = engine.run(engine.continuation(prompt))
    engine.forget_pages()
    found["rows forgotten"] = engine.run(engine.continuation(prompt))
    found["last block computed thrice"] = engine.run(prompt, 2 * BLOCK_SIZE)
    found["hit on a block whose rows are forgotten"] = engine.run(
        engine.continuation(prompt), 2 * BLOCK_SIZE
    )
    found["own rows behind forgotten ones"] = engine.run(
        engine.continuation(prompt), 3 * BLOCK_SIZE
    )
    assert engine.llm.reset_prefix_cache()
    found["after a reset"] = engine.run(prompt)
    found["hit after a reset"] = engine.run(engine.continuation(prompt))
    for level in (1, 2):
        engine.llm.sleep(level)
        engine.swap_weights()
        engine.llm.wake_up()
        found[f"after sleep {level}"] = engine.run(prompt)
        found[f"hit after sleep {level}"] = engine.run(engine.continuation(prompt))
    return found


@pytest.fixture(scope="module")
def rollouts(moe_model: Path, updated_moe_model: Path) -> dict[str, Rollout]:
    return run_in_engine_process(_run, moe_model, updated_moe_model)


UNRECORDED = ("rows forgotten", "hit on a block whose rows are forgotten")


def test_rows_are_those_of_the_kv_block_that_was_used(rollouts: dict[str, Rollout]) -> None:
    returned = {name: r for name, r in rollouts.items() if r.routed is not None}
    assert {name: r.ordered_differences() for name, r in returned.items()} == dict.fromkeys(
        returned, 0
    )
    assert sorted(set(rollouts) - set(returned)) == sorted(UNRECORDED)


def test_hits_over_new_weights_return_rows_of_the_old_ones(
    rollouts: dict[str, Rollout], oracle: TransformersOracle
) -> None:
    for name in ("hit on KV of old weights", "hit on the first of two blocks"):
        whole = rollouts[name]
        assert whole.num_cached == 3 * BLOCK_SIZE
        hit = Rollout(
            "", 0, whole.prompt[: 3 * BLOCK_SIZE], [0], whole.routed[: 3 * BLOCK_SIZE], ""
        )
        assert oracle.agreement([hit]).differing == 0


def test_the_block_that_was_computed_twice_has_new_rows_the_second_time(
    rollouts: dict[str, Rollout],
) -> None:
    first, second = rollouts["old weights"], rollouts["last block computed twice"]
    assert second.num_cached == 2 * BLOCK_SIZE
    assert (first.routed != second.routed)[2 * BLOCK_SIZE : 3 * BLOCK_SIZE].any()


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("old weights", "after sleep 1", "hit after sleep 1"), "moe_model"),
        (
            ("after a reset", "hit after a reset", "after sleep 2", "hit after sleep 2"),
            "updated_moe_model",
        ),
    ],
)
def test_after_a_reset_or_a_sleep_all_rows_are_of_the_weights_in_use(
    rollouts: dict[str, Rollout],
    names: tuple[str, ...],
    weights: str,
    request: pytest.FixtureRequest,
) -> None:
    oracle = TransformersOracle(request.getfixturevalue(weights))
    assert oracle.agreement([rollouts[name] for name in names]).differing == 0
