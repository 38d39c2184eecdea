"""A foreign route is used exactly, row by row, in every layer, forward and recompute."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint

import megatron_r3
from megatron_r3.recompute import CallLog
from tests.megatron.foreign_routes import (
    RouterWitness,
    expected_map,
    foreign_experts,
    foreign_routes,
)
from tests.megatron.micro_batches import (
    EQUAL,
    MIXED,
    MicroBatch,
    forward_backward,
    packed_micro_batches,
    padded_micro_batches,
    use_reference_attention,
)
from tests.megatron.test_own_record import RECOMPUTE, SCORES
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config

ORDERS = [(0, 1, 2), (2, 0, 1)]


def build(packed: bool = False, **overrides: Any) -> Any:
    [model] = tiny_chunks(tiny_config(**overrides))
    return use_reference_attention(model) if packed else model


def checkpoint_layers(model: Any, use_reentrant: bool) -> None:
    """Checkpoint every layer with torch's own function."""
    for layer in model.decoder.layers:

        def checkpointed(
            hidden_states: Any, stock: Any = layer.forward, **kwargs: Any
        ) -> tuple[torch.Tensor, Any]:
            return torch.utils.checkpoint.checkpoint(
                lambda hidden: stock(hidden_states=hidden, **kwargs),
                hidden_states,
                use_reentrant=use_reentrant,
            )

        layer.forward = checkpointed


def replay_foreign(
    model: Any,
    batches: Sequence[MicroBatch],
    order: Sequence[int] = (2, 0, 1),
    unrecorded: Sequence[tuple[int, int]] = (),
    controller: Any = None,
) -> tuple[RouterWitness, Any]:
    """Replay foreign routes in all micro-batches and watch every router."""
    controller = controller or megatron_r3.attach(model)
    witness = RouterWitness().watch(model)

    def before_forward(number: int, batch: MicroBatch) -> None:
        witness.micro_batch = number
        controller.feed(
            model,
            foreign_routes(controller.layout, batch.lengths, 10 * number, unrecorded),
            packed_seq_params=batch.packed_seq_params,
            host_lengths=batch.lengths,
            seq_length=batch.width,
        )

    def before_backward(number: int) -> None:
        witness.micro_batch = number

    with controller.schedule("replay") as schedule:
        forward_backward(model, batches, before_forward, before_backward, order)
    return witness, schedule


def replayed_cells(
    batch: MicroBatch, number: int, unrecorded: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int] | None]:
    """The identity of each router row that has to follow the route."""
    return [
        (10 * number + cell[0], cell[1])
        if cell and cell[1] < batch.lengths[cell[0]] - 1 and cell not in unrecorded
        else None
        for cell in batch.cells()
    ]


def assert_used(
    witness: RouterWitness,
    batches: Sequence[MicroBatch],
    layout: Any,
    recomputed_layers: int,
    unrecorded: Sequence[tuple[int, int]] = (),
) -> None:
    """Every call used the foreign experts in the replayed rows, and recomputes repeat it."""
    layers = layout.num_moe_layers
    assert len(witness.forwards) == len(batches) * layers
    assert len(witness.recomputes) == len(batches) * recomputed_layers
    for (number, layer), used in [*witness.forwards.items(), *witness.recomputes.items()]:
        expected, replayed = expected_map(
            layout, replayed_cells(batches[number], number, unrecorded), layer
        )
        assert replayed.any()
        assert torch.equal(used[replayed], expected[replayed])
        assert used.sum(1).eq(layout.top_k).all()
    for call, used in witness.recomputes.items():
        assert torch.equal(used, witness.forwards[call])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_every_router_uses_its_rows(
    world_of_one: None, recompute: str, order: Sequence[int], packed: bool
) -> None:
    model = build(packed, **RECOMPUTE[recompute])
    batches = packed_micro_batches() if packed else padded_micro_batches()
    witness, schedule = replay_foreign(model, batches, order)
    recomputed = {"none": 0, "full": 3, "block": 2, "selective": 3}[recompute]
    assert_used(witness, batches, layout_of(model), recomputed)
    tokens = sum(sum(batch.lengths) for batch in batches)
    samples = sum(len(batch.lengths) for batch in batches)
    rows = schedule.report.rows
    assert rows.replayed == tokens - samples
    assert rows.unrecorded == samples
    assert rows.padding == sum(batch.tokens.numel() for batch in batches) - tokens


@pytest.mark.parametrize("scores", list(SCORES)[1:])
def test_every_score_function_follows_the_route(world_of_one: None, scores: str) -> None:
    model = build(**SCORES[scores], **RECOMPUTE["full"])
    batches = padded_micro_batches()
    witness, _ = replay_foreign(model, batches)
    assert_used(witness, batches, layout_of(model), 3)


def test_more_than_256_experts_travel_in_two_bytes(world_of_one: None) -> None:
    model = build(num_moe_experts=300, **RECOMPUTE["full"])
    batches = padded_micro_batches()
    witness, _ = replay_foreign(model, batches, unrecorded=[(0, 1)])
    assert_used(witness, batches, layout_of(model), 3, unrecorded=[(0, 1)])


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_checkpoints_of_torch_repeat_their_forward(
    world_of_one: None, order: Sequence[int], use_reentrant: bool
) -> None:
    model = build()
    checkpoint_layers(model, use_reentrant)
    batches = padded_micro_batches()
    witness, _ = replay_foreign(model, batches, order)
    assert_used(witness, batches, layout_of(model), 3)


@pytest.mark.parametrize("sizes", [MIXED, EQUAL], ids=["mixed_sizes", "equal_sizes"])
def test_recomputes_in_first_in_first_out_order_are_caught(
    world_of_one: None, monkeypatch: pytest.MonkeyPatch, sizes: Any
) -> None:
    def first_in_first_out(self: Any) -> Any:
        self.taken = getattr(self, "taken", -1) + 1
        return self._without_grad.frames[self.taken]

    monkeypatch.setattr(CallLog, "repeated", first_in_first_out)
    model = build(**RECOMPUTE["full"])
    batches = padded_micro_batches(sizes)
    if sizes is MIXED:
        with pytest.raises(megatron_r3.RowCountError, match="the router sees 30 rows in"):
            replay_foreign(model, batches, (2, 0, 1))
        return
    witness, _ = replay_foreign(model, batches, (2, 0, 1))
    with pytest.raises(AssertionError):
        assert_used(witness, batches, layout_of(model), 3)


def test_unrecorded_rows_are_recomputed_as_they_ran_although_the_logits_moved(
    world_of_one: None,
) -> None:
    unrecorded = [(0, 2), (0, 3), (1, 0)]
    model = build(**RECOMPUTE["full"])
    routers = [layer.mlp.router for layer in model.decoder.layers[1:]]
    batches = padded_micro_batches()
    for router in routers:

        def disturbed(hidden: Any, stock: Any = router.gating) -> Any:
            logits = stock(hidden)
            in_backward = torch._C._current_graph_task_id() != -1
            return logits + torch.randn_like(logits) if in_backward else logits

        router.gating = disturbed
    witness, schedule = replay_foreign(model, batches, unrecorded=unrecorded)
    assert_used(witness, batches, layout_of(model), 3, unrecorded)
    samples = sum(len(batch.lengths) for batch in batches)
    assert schedule.report.rows.unrecorded == samples + sum(
        (sample, position) in unrecorded
        for batch in batches
        for sample, length in enumerate(batch.lengths)
        for position in range(length - 1)
    )


def test_unrecorded_rows_and_padding_route_as_without_replay(world_of_one: None) -> None:
    """The first MoE layer sees the same input natively, so its own choice is known."""
    unrecorded = [(0, 2), (1, 0)]
    [batch] = padded_micro_batches(MIXED[:1])
    model = build()
    native = RouterWitness(micro_batch=0).watch(model)
    forward_backward(model, [batch], order=(0,))
    own = native.forwards[0, 0]
    native.micro_batch = 1
    witness, _ = replay_foreign(model, [batch], (0,), unrecorded)
    used = witness.forwards[0, 0]
    _, replayed = expected_map(layout_of(model), replayed_cells(batch, 0, unrecorded), layer=0)
    assert (~replayed).sum() == 2 + 2 + 10  # unrecorded, last tokens, padding
    assert torch.equal(used[~replayed], own[~replayed])
    assert not torch.equal(used[replayed], own[replayed])


def test_the_gate_learns_under_a_foreign_route(world_of_one: None) -> None:
    model = build()
    replay_foreign(model, padded_micro_batches())
    for layer in model.decoder.layers[1:]:
        gradient = layer.mlp.router.weight.grad
        assert gradient is not None
        assert torch.count_nonzero(gradient.abs().sum(1)) == gradient.shape[0]


def test_foreign_routes_are_foreign(world_of_one: None) -> None:
    layout = layout_of(build())
    rows = {
        tuple(sorted(foreign_experts(layout, *cell)))
        for cell in np.ndindex(6, 6, layout.num_moe_layers)
    }
    assert len(rows) > 90


def layout_of(model: Any) -> Any:
    from shared_schema import RoutingLayout

    return RoutingLayout.from_megatron_config(model.config)
