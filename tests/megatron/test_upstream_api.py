"""Actions set by hand through megatron-core's own ``RouterReplay`` work as they do upstream."""

from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch

import megatron_r3
from tests.megatron.foreign_routes import RouterWitness, foreign_routes
from tests.megatron.micro_batches import MIXED, MicroBatch, forward, padded_micro_batches
from tests.megatron.test_foreign_routes import RECOMPUTE, layout_of
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config


@pytest.fixture
def model(world_of_one: None) -> Iterator[Any]:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    RouterReplay.clear_global_router_replay_instances()
    [model] = tiny_chunks(tiny_config(moe_enable_routing_replay=True, **RECOMPUTE["full"]))
    megatron_r3.attach(model)
    yield model
    RouterReplay.clear_global_router_replay_instances()


def targets_of(model: Any, batch: MicroBatch) -> list[torch.Tensor]:
    """A foreign target ``[T, k]`` int64 for each router, in row order ``s * B + b``."""
    layout = layout_of(model)
    # One token more for each sample, so that every row of the batch has a route.
    routes = foreign_routes(layout, [batch.width + 1] * len(batch.lengths))
    ids = np.stack([routed.ids for routed in routes], axis=1).astype(np.int64)
    return [torch.from_numpy(ids[:, :, layer].reshape(-1, layout.top_k)) for layer in range(3)]


def as_map(target: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(target), 16, dtype=torch.bool).scatter(1, target, True)


def test_replay_forward_and_backward_follow_the_targets(model: Any) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    batches = padded_micro_batches()
    witness = RouterWitness().watch(model)
    targets = [targets_of(model, batch) for batch in batches]
    losses = []
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    for number, batch in enumerate(batches):
        witness.micro_batch = number
        RouterReplay.set_replay_data(targets[number])
        losses.append(forward(model, batch).sum())
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    for number, loss in enumerate(losses):
        witness.micro_batch = number
        loss.backward()
    for number in range(3):
        for layer in range(3):
            expected = as_map(targets[number][layer])
            assert torch.equal(witness.forwards[number, layer], expected)
            assert torch.equal(witness.recomputes[number, layer], expected)


def test_record_keeps_what_the_routers_chose(model: Any) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    [batch] = padded_micro_batches(MIXED[:1])
    witness = RouterWitness(micro_batch=0).watch(model)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    forward(model, batch)
    recorded = RouterReplay.get_recorded_data()
    for layer in range(3):
        assert torch.equal(as_map(recorded[layer]), witness.forwards[0, layer])
    RouterReplay.clear_global_router_replay_action()
    RouterReplay.clear_global_indices()
    assert RouterReplay.get_recorded_data() == [None] * 3


def test_actions_of_another_enum_are_known_by_their_value(model: Any) -> None:
    class Action(Enum):
        REPLAY_FORWARD = "replay_forward"

    [batch] = padded_micro_batches(MIXED[:1])
    witness = RouterWitness(micro_batch=0).watch(model)
    targets = targets_of(model, batch)
    for layer, router in enumerate(layer.mlp.router for layer in model.decoder.layers[1:]):
        router.router_replay.set_target_indices(targets[layer])
        router.router_replay.set_router_replay_action(Action.REPLAY_FORWARD)
    forward(model, batch)
    for layer in range(3):
        assert torch.equal(witness.forwards[0, layer], as_map(targets[layer]))


@pytest.mark.parametrize("kind", ["short", "narrow", "missing", "empty_queue"])
def test_targets_that_upstream_takes_silently_are_named(model: Any, kind: str) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    [batch] = padded_micro_batches(MIXED[:1])
    targets = targets_of(model, batch)
    action = RouterReplayAction.REPLAY_FORWARD
    if kind == "short":
        RouterReplay.set_replay_data([target[:-1] for target in targets])
    elif kind == "narrow":
        RouterReplay.set_replay_data([target[:, :-1] for target in targets])
    elif kind == "empty_queue":
        action = RouterReplayAction.REPLAY_BACKWARD
    RouterReplay.set_global_router_replay_action(action)
    seen = {"short": r"of shape \(23, 4\)", "narrow": r"of shape \(24, 3\)"}.get(kind, "missing")
    with pytest.raises(megatron_r3.RowCountError, match=rf"{seen}, expected \(24, 4\)"):
        forward(model, batch)


def test_an_action_set_by_hand_in_an_open_schedule_is_named(model: Any) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    [batch] = padded_micro_batches(MIXED[:1])
    megatron_r3.detach(model)
    controller = megatron_r3.attach(model)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)

    def record() -> None:
        with controller.schedule("record"):
            controller.feed(model, host_lengths=batch.lengths, seq_length=batch.width)
            forward(model, batch)

    with pytest.raises(megatron_r3.ReplayStateError, match="set by hand inside an open schedule"):
        record()
