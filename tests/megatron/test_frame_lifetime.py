"""A rank holds the routes of a micro-batch on its device for as long as some call may need them."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

import megatron_r3
from megatron_r3 import ReplayStateError
from tests.megatron.foreign_routes import foreign_routes
from tests.megatron.micro_batches import (
    MicroBatch,
    forward,
    forward_backward,
    padded_micro_batches,
)
from tests.megatron.test_foreign_routes import (
    assert_used,
    checkpoint_layers,
    layout_of,
    replay_foreign,
)
from tests.megatron.test_own_record import RECOMPUTE
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config


class Held:
    """The micro-batches of a schedule whose ids are in memory."""

    def __init__(self, controller: Any) -> None:
        self.controller = controller
        self.ids: list[Any] = []

    def feed(self, model: Any, batch: MicroBatch) -> None:
        routes = foreign_routes(self.controller.layout, batch.lengths)
        self.controller.feed(model, routes, host_lengths=batch.lengths, seq_length=batch.width)
        [chunk] = self.controller._chunks
        self.ids.append(weakref.ref(chunk.calls.frames[-1].ids))

    def __call__(self) -> list[int]:
        return [number for number, ids in enumerate(self.ids) if ids() is not None]


def build(**overrides: Any) -> tuple[Any, Held]:
    [model] = tiny_chunks(tiny_config(**overrides))
    return model, Held(megatron_r3.attach(model))


def held_in_a_step(model: Any, held: Held, order: Sequence[int]) -> list[list[int]]:
    """What is held before each backward and behind the last."""
    seen = []
    with held.controller.schedule("replay"):
        forward_backward(
            model,
            padded_micro_batches(),
            lambda _, batch: held.feed(model, batch),
            lambda _: seen.append(held()),
            order,
        )
        seen.append(held())
    return seen


@pytest.mark.parametrize("checkpoint", ["full", "block", "selective", "reentrant", "non_reentrant"])
def test_routes_go_when_their_recompute_is_over(world_of_one: None, checkpoint: str) -> None:
    model, held = build(**RECOMPUTE.get(checkpoint, {}))
    if checkpoint.endswith("reentrant"):
        checkpoint_layers(model, use_reentrant=checkpoint == "reentrant")
    assert held_in_a_step(model, held, (2, 0, 1)) == [[0, 1, 2], [0, 1], [1], []]


def test_routes_that_nothing_recomputes_go_behind_their_forward(world_of_one: None) -> None:
    assert held_in_a_step(*build(), (2, 0, 1)) == [[], [], [], []]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_pass_without_gradients_holds_nothing(world_of_one: None, recompute: str) -> None:
    model, held = build(**RECOMPUTE[recompute])
    with held.controller.schedule("replay"), torch.no_grad():
        for batch in padded_micro_batches():
            held.feed(model, batch)
            assert len(held()) == 1
            forward(model, batch)
            assert held() == []


def test_routes_fed_without_gradients_are_missed_by_name_in_a_recompute(
    world_of_one: None,
) -> None:
    model, held = build(**RECOMPUTE["full"])
    batch = padded_micro_batches()[0]

    def train() -> None:
        with held.controller.schedule("replay"):
            with torch.no_grad():
                held.feed(model, batch)
            forward(model, batch).sum().backward()

    with pytest.raises(ReplayStateError, match=r"call feed\(\) where gradients are enabled"):
        train()


def test_what_ended_with_a_schedule_can_still_be_explained(world_of_one: None) -> None:
    model, held = build()
    batch = padded_micro_batches()[0]
    with held.controller.schedule("replay") as schedule:
        held.feed(model, batch)
        forward(model, batch)
    assert "sample 0: replayed 0…7, unrecorded 8…8" in schedule.explain(0)
    assert schedule.metrics().layers[0].replayed == sum(batch.lengths) - len(batch.lengths)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("reentrant", "reentrant"), ("reentrant", "non_reentrant"), ("non_reentrant", "reentrant")],
)
def test_a_checkpoint_inside_a_checkpoint_is_refused(
    world_of_one: None, outer: str, inner: str
) -> None:
    model, held = build()
    for kind in (inner, outer):
        checkpoint_layers(model, use_reentrant=kind == "reentrant")
    with pytest.raises(ReplayStateError, match="checkpoint inside a checkpoint"):
        held_in_a_step(model, held, (2, 0, 1))


def test_non_reentrant_checkpoints_of_torch_may_be_nested(world_of_one: None) -> None:
    model, _ = build()
    checkpoint_layers(model, use_reentrant=False)
    checkpoint_layers(model, use_reentrant=False)
    megatron_r3.detach(model)
    batches = padded_micro_batches()
    witness, _ = replay_foreign(model, batches, (2, 0, 1))
    assert_used(witness, batches, layout_of(model), 3)
