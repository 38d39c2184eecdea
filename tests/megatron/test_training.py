"""Several steps, several models and steps that break off, on several ranks."""

import contextlib
from typing import Any

import pytest
import torch

from tests.megatron.gloo_pool import GlooPool
from tests.megatron.parallel_run import Followed, Part, Rank, checkpoint_parts
from tests.megatron.parallel_table import ALLTOALL, EP, FULL, PP, TP, VPP, Layout
from tests.megatron.test_parallel import assert_same

UPDATED: dict[str, Layout] = {
    "dp2": Layout(),
    "ep2": Layout({EP: 2}, FULL | ALLTOALL),
    "tp2_pp2": Layout({TP: 2, PP: 2}, world_size=4),
}


def train(layout: Layout) -> dict[str, list[Part]]:
    """Two updates by Megatron's distributed Adam under foreign routes; the weights by key."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    rank = Rank(layout, distributed_optimizer=True)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1.0,
            adam_eps=1.0,  # a small one makes a step of full length out of any rounding
            weight_decay=0.0,
            clip_grad=0.5,
            params_dtype=torch.float32,
            use_distributed_optimizer=True,
        ),
        rank.wrapped,
    )
    before = [parameter.clone() for chunk in rank.chunks for parameter in chunk.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        with rank.controller.schedule("replay"):
            step = rank.step(rank.foreign_routes)
        assert rank.followed(step).wrong == rank.followed(step, recompute=True).wrong == 0
        updated, _, _ = optimizer.step()
        assert updated
    after = [parameter for chunk in rank.chunks for parameter in chunk.parameters()]
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(after, before, strict=True))
    weights: dict[str, list[Part]] = {}
    for chunk in rank.chunks:
        for key, part in checkpoint_parts(chunk):
            part.values = part.values.clone()
            weights.setdefault(key, []).append(part)
    return weights


@pytest.fixture(scope="module")
def trained_in_one_process() -> dict[str, list[Part]]:
    [weights] = GlooPool(1).run(train, Layout(world_size=1))
    return weights


@pytest.mark.parametrize("name", UPDATED)
def test_the_distributed_optimizer_updates_as_in_one_process(
    trained_in_one_process: dict[str, list[Part]], name: str
) -> None:
    layout = UPDATED[name]
    ranks = GlooPool(layout.world_size).run(train, layout, **layout.groups)
    for key, parts in trained_in_one_process.items():
        assert_same([p for rank in ranks for p in rank.get(key, [])], parts, key)


def train_two_models(layout: Layout) -> list[Followed]:
    """A step of one model inside the open schedule of the other, whose step comes after."""
    policy, critic = Rank(layout), Rank(layout, first_sample=1000)
    with policy.controller.schedule("replay"):
        with critic.controller.schedule("replay"):
            inner = critic.step(critic.foreign_routes)
        outer = policy.step(policy.foreign_routes)
    return [
        rank.followed(step, recompute)
        for rank, step in ((policy, outer), (critic, inner))
        for recompute in (False, True)
    ]


def test_two_models_in_one_process_replay_their_own_routes(gloo_2: GlooPool) -> None:
    layout = Layout({PP: 2, VPP: 2})
    for rank in gloo_2.run(train_two_models, layout, **layout.groups):
        assert [followed.wrong for followed in rank] == [0, 0, 0, 0]
        assert len({followed.rows for followed in rank}) == 1


def break_off_and_train(layout: Layout) -> list[Followed]:
    """A step that an error ends in its middle, one that evaluates, one that trains."""
    rank = Rank(layout)

    def until_the_third(micro_batch: int) -> Any:
        if micro_batch == 2:
            raise InterruptedError
        return rank.foreign_routes(micro_batch)

    with contextlib.suppress(InterruptedError), rank.controller.schedule("replay"):
        rank.step(until_the_third)
    with rank.controller.schedule("replay"):
        evaluated = rank.step(rank.foreign_routes, forward_only=True)
    with rank.controller.schedule("replay"):
        trained = rank.step(rank.foreign_routes)
    return [
        rank.followed(evaluated),
        rank.followed(trained),
        rank.followed(trained, recompute=True),
    ]


def test_a_step_that_breaks_off_leaves_nothing_to_the_next(gloo_2: GlooPool) -> None:
    layout = Layout({TP: 2})
    for rank in gloo_2.run(break_off_and_train, layout, **layout.groups):
        assert [followed.wrong for followed in rank] == [0, 0, 0]
        assert len({followed.rows for followed in rank}) == 1


def attach_to_overlap() -> str:
    from megatron_r3 import UnsupportedRouterError
    from tests.megatron.parallel_table import LAYOUTS

    layout = LAYOUTS["ep2 overlap"]
    with pytest.raises(UnsupportedRouterError) as error:
        Rank(Layout(layout.groups, layout.config))
    return str(error.value)


def test_overlap_of_expert_parallelism_has_to_be_accepted(gloo_2: GlooPool) -> None:
    for message in gloo_2.run(attach_to_overlap, expert_model_parallel_size=2):
        assert "expert_parallel_overlap: the router runs after forward_step returned" in message
