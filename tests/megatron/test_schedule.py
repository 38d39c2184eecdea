"""Schedules: what they leave behind, what they nest, and which misuse they name."""

import contextlib
from typing import Any

import numpy as np
import pytest
import torch

import megatron_r3
from megatron_r3 import ReplayStateError
from tests.megatron.foreign_routes import RouterWitness, expected_map, foreign_routes
from tests.megatron.micro_batches import (
    MIXED,
    MicroBatch,
    forward,
    forward_backward,
    padded_micro_batches,
)
from tests.megatron.test_foreign_routes import (
    RECOMPUTE,
    assert_used,
    layout_of,
    replay_foreign,
    replayed_cells,
)
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config, train_step


def build(**overrides: Any) -> Any:
    return tiny_chunks(tiny_config(**overrides))[0]


def feed(controller: Any, model: Any, batch: MicroBatch, routes: Any = "foreign") -> None:
    if isinstance(routes, str):
        routes = foreign_routes(controller.layout, batch.lengths)
    controller.feed(model, routes, host_lengths=batch.lengths, seq_length=batch.width)


def used_by(model: Any, batch: MicroBatch) -> list[torch.Tensor]:
    """Experts that each router uses for ``batch`` now."""
    witness = RouterWitness(micro_batch=0)
    hooks = witness.watch(model).hooks
    with torch.no_grad():
        forward(model, batch)
    for hook in hooks:
        hook.remove()
    return [witness.forwards[0, layer] for layer in range(3)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_a_schedule_routing_is_native(world_of_one: None) -> None:
    model, [batch] = build(), padded_micro_batches(MIXED[:1])
    before = used_by(model, batch)
    controller = megatron_r3.attach(model)
    assert same(used_by(model, batch), before)
    with controller.schedule("native"):
        feed(controller, model, batch)
        assert same(used_by(model, batch), before)


def test_replay_works_in_eval_mode_without_gradients(world_of_one: None) -> None:
    model, [batch] = build(**RECOMPUTE["full"]).eval(), padded_micro_batches(MIXED[:1])
    controller = megatron_r3.attach(model)
    with controller.schedule("replay") as schedule:
        feed(controller, model, batch)
        used = used_by(model, batch)
    for layer, experts in enumerate(used):
        expected, replayed = expected_map(controller.layout, replayed_cells(batch, 0), layer)
        assert torch.equal(experts[replayed], expected[replayed])
    assert schedule.report.recomputes == 0


def test_a_forward_only_pass_leaves_nothing_for_the_training_step(world_of_one: None) -> None:
    model, batches = build(**RECOMPUTE["full"]), padded_micro_batches()
    controller = megatron_r3.attach(model)
    with controller.schedule("replay"), torch.no_grad():
        for batch in batches[::-1]:
            feed(controller, model, batch)
            forward(model, batch)
    witness, _ = replay_foreign(model, batches, controller=controller)
    assert_used(witness, batches, layout_of(model), 3)


def test_evaluation_and_training_may_share_a_schedule(world_of_one: None) -> None:
    model, batches = build(**RECOMPUTE["full"]), padded_micro_batches()
    controller = megatron_r3.attach(model)
    with controller.schedule("replay") as schedule:
        with torch.no_grad():
            feed(controller, model, batches[0])
            forward(model, batches[0])
        forward_backward(model, batches, lambda _, batch: feed(controller, model, batch))
    assert schedule.report.recomputes == 9


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_a_native_schedule_inside_a_replay_is_native_and_recomputes_natively(
    world_of_one: None, recompute: str
) -> None:
    model, [batch, other] = build(**RECOMPUTE[recompute]), padded_micro_batches(MIXED[:2])
    native = used_by(model, batch)
    controller = megatron_r3.attach(model)
    witness = RouterWitness().watch(model)
    with controller.schedule("replay"):
        with controller.schedule("native"):
            witness.micro_batch = 0
            feed(controller, model, batch)
            reference = forward(model, batch)
        feed(controller, model, other)
        witness.micro_batch = 1
        policy = forward(model, other)
        witness.micro_batch = 0
        reference.sum().backward()
        witness.micro_batch = 1
        policy.sum().backward()
    for layer in range(3):
        assert torch.equal(witness.forwards[0, layer], native[layer])
        assert torch.equal(witness.recomputes[0, layer], native[layer])
        assert torch.equal(witness.recomputes[1, layer], witness.forwards[1, layer])
        expected, replayed = expected_map(controller.layout, replayed_cells(other, 0), layer)
        assert torch.equal(witness.forwards[1, layer][replayed], expected[replayed])


def test_an_exception_leaves_nothing_armed(world_of_one: None) -> None:
    model, batches = build(**RECOMPUTE["full"]), padded_micro_batches()
    native = used_by(model, batches[0])
    controller = megatron_r3.attach(model)
    with contextlib.suppress(InterruptedError), controller.schedule("replay"):
        feed(controller, model, batches[0])
        forward(model, batches[0])
        feed(controller, model, batches[1])
        raise InterruptedError
    assert same(used_by(model, batches[0]), native)
    witness, _ = replay_foreign(model, batches, controller=controller)
    assert_used(witness, batches, layout_of(model), 3)


def test_a_recompute_behind_the_schedule_is_named(world_of_one: None) -> None:
    model, [batch] = build(**RECOMPUTE["full"]), padded_micro_batches(MIXED[:1])
    controller = megatron_r3.attach(model)
    with controller.schedule("replay"):
        feed(controller, model, batch)
        logits = forward(model, batch)
    with pytest.raises(ReplayStateError, match=r"layer 3 of chunk 0 is recomputed after its"):
        logits.sum().backward()


def test_a_graph_that_is_older_than_the_schedule_recomputes_natively(world_of_one: None) -> None:
    model, [batch, other] = build(**RECOMPUTE["full"]), padded_micro_batches(MIXED[:2])
    controller = megatron_r3.attach(model)
    witness = RouterWitness(micro_batch=0).watch(model)
    older = forward(model, batch)
    with controller.schedule("replay"):
        feed(controller, model, other)
        witness.micro_batch = 1
        forward(model, other)
        witness.micro_batch = 0
        older.sum().backward()
    for layer in range(3):
        assert torch.equal(witness.recomputes[0, layer], witness.forwards[0, layer])


def test_a_second_recompute_of_the_same_graph_is_named(world_of_one: None) -> None:
    model, [batch] = build(**RECOMPUTE["full"]), padded_micro_batches(MIXED[:1])
    controller = megatron_r3.attach(model)
    with controller.schedule("replay"):
        feed(controller, model, batch)
        loss = forward(model, batch).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(ReplayStateError, match="a second time for micro-batch 0"):
            loss.backward()


MISUSE: dict[str, tuple[str, str]] = {
    "no_schedule": ("", "was called outside a schedule"),
    "no_routes": ("replay", "got no routes in schedule"),
    "routes_when_recording": ("record", "got routes in schedule"),
    "forward_without_feed": ("replay", "layer 2 of chunk 0 runs a forward after 0 fed"),
    "second_forward_for_one_feed": ("replay", "layer 2 of chunk 0 runs a forward after 1 fed"),
    "feed_without_forward": ("replay", r"micro-batch 0 was fed to chunk 0, but its layers \[2, 3"),
    "two_feeds_for_one_forward": ("replay", r"micro-batch 0 was fed to chunk 0, but its layers"),
    "schedule_in_schedule": ("replay", "was opened inside another schedule"),
    "unknown_mode": ("replays", "the schedule is 'replays'"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_named(world_of_one: None, case: str) -> None:
    mode, message = MISUSE[case]
    model, [batch] = build(), padded_micro_batches(MIXED[:1])
    controller = megatron_r3.attach(model)

    def misuse() -> None:
        if case == "no_schedule":
            feed(controller, model, batch)
        with controller.schedule(mode):
            if case == "no_routes":
                feed(controller, model, batch, None)
            if case not in ("forward_without_feed", "schedule_in_schedule"):
                feed(controller, model, batch)
            if case == "two_feeds_for_one_forward":
                feed(controller, model, batch)
            if case == "schedule_in_schedule":
                with controller.schedule("record"):
                    pass
            if case.endswith("feed"):
                forward(model, batch)
                forward(model, batch)

    with pytest.raises(ReplayStateError, match=message):
        misuse()


def test_routers_that_were_recomputed_in_some_micro_batches_only_are_named(
    world_of_one: None,
) -> None:
    model, batches = build(**RECOMPUTE["full"]), padded_micro_batches()
    controller = megatron_r3.attach(model)

    def lose_a_recompute() -> None:
        with controller.schedule("replay"):
            forward_backward(
                model, batches[:2], lambda _, batch: feed(controller, model, batch), order=(0, 1)
            )
            # What a recompute that went astray leaves behind.
            controller._chunks[0].calls.frames[1].recomputes[1] = 0

    with pytest.raises(ReplayStateError, match=r"layer 3 of chunk 0 .* but not in \[1\]"):
        lose_a_recompute()


def test_recorded_routes_name_what_is_missing(world_of_one: None) -> None:
    model, [batch] = build(), padded_micro_batches(MIXED[:1])
    controller = megatron_r3.attach(model)
    with controller.schedule("record") as recording:
        feed(controller, model, batch, None)
        forward(model, batch)
        with pytest.raises(ReplayStateError, match="that is open"):
            recording.gather()
    with controller.schedule("replay") as replay:
        pass
    with pytest.raises(ReplayStateError, match=r"schedule\('replay'\), expected a recording"):
        replay.gather()


def test_recorded_routes_are_what_the_routers_used(world_of_one: None) -> None:
    model, batches = build(), padded_micro_batches()
    controller = megatron_r3.attach(model)
    witness = RouterWitness().watch(model)
    with controller.schedule("record") as recording:
        for number, batch in enumerate(batches):
            witness.micro_batch = number
            feed(controller, model, batch, None)
            forward(model, batch)
    recorded = iter(recording.gather())
    for number, batch in enumerate(batches):
        samples = [next(recorded) for _ in batch.lengths]
        assert [sample.num_rows for sample in samples] == list(batch.lengths)
        assert all(sample.spans[0].source == "trainer" for sample in samples)
        for row, cell in enumerate(batch.cells()):
            if cell:
                for layer in range(3):
                    used = np.flatnonzero(witness.forwards[number, layer][row].numpy())
                    assert sorted(samples[cell[0]].ids[cell[1], layer]) == used.tolist()


def test_a_schedule_of_megatron_runs_in_replay(world_of_one: None) -> None:
    """Through ``forward_backward_func``, with ``feed`` in ``forward_step`` as an adopter writes."""
    model = build(**RECOMPUTE["full"])
    controller = megatron_r3.attach(model)
    routes = foreign_routes(controller.layout, (16, 16))
    model.register_forward_pre_hook(
        lambda chunk, _: controller.feed(chunk, routes, host_lengths=(16, 16))
    )
    with controller.schedule("replay") as schedule:
        losses = train_step([model], num_microbatches=3)
    assert len(losses) == 3
    assert schedule.report.rows.replayed == 3 * 30
    assert schedule.report.recomputes == 9
