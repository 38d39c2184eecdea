"""Routers in CUDA graphs: one fixed series of kernels follows whatever targets are fed."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import megatron_r3
from megatron_r3.static_targets import NATIVE, StaticTargets
from tests.megatron.foreign_routes import RouterWitness, expected_map, foreign_routes
from tests.megatron.micro_batches import EQUAL, MIXED, forward, forward_backward
from tests.megatron.micro_batches import padded_micro_batches as padded
from tests.megatron.test_foreign_routes import assert_used, layout_of, replay_foreign
from tests.megatron.test_metrics import WAITS, Operations
from tests.megatron.test_own_record import RECOMPUTE
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config


def build(**overrides: Any) -> Any:
    """A model whose config says that its routers are captured."""
    [model] = tiny_chunks(tiny_config(**overrides))
    model.config.cuda_graph_impl = "local"
    return model


def test_captured_routers_follow_every_micro_batch_and_route_natively_outside(
    world_of_one: None,
) -> None:
    model, batches = build(), padded(EQUAL)
    native = RouterWitness(micro_batch=9).watch(model)
    forward(model, batches[0])
    for hook in native.hooks:
        hook.remove()
    controller = megatron_r3.attach(model, graph_rows=24)
    witness, schedule = replay_foreign(model, batches, unrecorded=[(0, 2)], controller=controller)
    assert_used(witness, batches, layout_of(model), 0, unrecorded=[(0, 2)])
    assert schedule.metrics().total.sampled == 0
    assert (schedule.report.rows.replayed, schedule.report.rows.unrecorded) == (29, 9)
    unreplayed = torch.tensor(
        [cell is None or cell[1] == batches[0].lengths[cell[0]] - 1 for cell in batches[0].cells()]
    )
    assert torch.equal(witness.forwards[0, 0][unreplayed], native.forwards[9, 0][unreplayed])
    witness.micro_batch = 9
    forward(model, batches[0])
    witness.micro_batch = 10
    with controller.schedule("native"):
        forward(model, batches[0])
    for number in (9, 10):
        for layer in range(3):
            assert torch.equal(witness.forwards[number, layer], native.forwards[9, layer])


def test_the_choice_is_one_graph_for_all_targets(world_of_one: None) -> None:
    """Traced without values, so that a branch on one or a wait for one cannot be traced."""
    static = StaticTargets(2, 6, 4, torch.device("cpu"))
    scores = torch.randn(6, 16)

    def choose(targets: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        static.targets = targets
        return static.choose(1, scores, lambda scores: torch.topk(scores, 4, dim=1))

    empty = static.targets
    graph = make_fx(choose, tracing_mode="fake")(empty, scores)
    own = torch.topk(scores, 4, dim=1).indices
    assert torch.equal(graph(empty, scores), own)
    targets = torch.randint(0, 16, (2, 6, 4), dtype=torch.int32)
    targets[:, ::2] = NATIVE
    chosen = graph(targets, scores)
    assert torch.equal(chosen[::2], own[::2])
    assert torch.equal(chosen[1::2], targets[1, 1::2].long())


def test_a_captured_router_runs_the_same_kernels_for_all_targets(world_of_one: None) -> None:
    model = build()
    controller = megatron_r3.attach(model, graph_rows=24)
    router = model.decoder.layers[1].mlp.router
    hidden = torch.randn(12, 2, 64, requires_grad=True)
    kernels = []
    for mode, lengths, unrecorded in (
        ("native", (12, 12), ()),
        ("replay", (12, 12), ()),
        ("replay", (7, 3), ((0, 1), (0, 2), (1, 0))),
    ):
        with controller.schedule(mode):
            routes = foreign_routes(controller.layout, lengths, unrecorded=unrecorded)
            controller.feed(model, routes, host_lengths=lengths, seq_length=12)
            hidden.grad = router.weight.grad = None
            with Operations() as operations:
                probs, _ = router(hidden)
                probs.pow(2).sum().backward()
        kernels.append(operations.counts)
    assert kernels[0] == kernels[1] == kernels[2]
    assert not [name for name in kernels[0] if any(wait in name for wait in WAITS)]


def test_what_a_captured_router_cannot_do_is_named(world_of_one: None) -> None:
    model, [batch, other] = build(**RECOMPUTE["full"]), padded(MIXED[:2])
    with pytest.raises(megatron_r3.UnsupportedRouterError, match=r"cuda_graph: .*graph_rows="):
        megatron_r3.attach(model)
    with pytest.raises(
        megatron_r3.UnsupportedRouterError, match=r"aux_loss is 'off' .* with graph"
    ):
        megatron_r3.attach(model, graph_rows=24, aux_loss="off")
    controller = megatron_r3.attach(model, graph_rows=24)

    def run(mode: str, batch: Any) -> None:
        with controller.schedule(mode):
            routes = foreign_routes(controller.layout, batch.lengths)
            controller.feed(
                model,
                routes if mode == "replay" else None,
                host_lengths=batch.lengths,
                seq_length=batch.width,
            )
            forward_backward(model, [batch], order=(0,))

    with pytest.raises(megatron_r3.RowCountError, match="has 8 rows on this rank, expected the 24"):
        run("replay", other)
    with pytest.raises(
        megatron_r3.ReplayStateError, match=r"is recomputed with attach\(graph_rows"
    ):
        run("replay", batch)
    with pytest.raises(megatron_r3.ReplayStateError, match=r"'record'\) was opened with attach"):
        run("record", batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_graph_follows_targets_that_are_fed_behind_the_capture(
    world_of_one: None,
) -> None:
    """Forward and backward of the real router in ``torch.cuda.graph``, with two sets of routes."""
    model = build().cuda()
    controller = megatron_r3.attach(model, graph_rows=24)
    router = model.decoder.layers[1].mlp.router
    hidden = torch.randn(12, 2, 64, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            router(hidden)[0].pow(2).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    hidden.grad = None
    with torch.cuda.graph(graph):
        probs, used = router(hidden)
        probs.pow(2).sum().backward()
    for first in (0, 10):
        lengths = (12, 9)
        cells = [
            (first + sample, position) if position < lengths[sample] - 1 else None
            for position in range(12)
            for sample in range(2)
        ]
        with controller.schedule("replay"):
            routes = foreign_routes(controller.layout, lengths, first)
            controller.feed(model, routes, host_lengths=lengths, seq_length=12)
            graph.replay()
        expected, replayed = expected_map(controller.layout, cells, layer=0)
        assert torch.equal(used.cpu()[replayed], expected[replayed])
        assert torch.equal(probs.detach() != 0, used)
    graph.replay()
    native, _ = router(hidden)
    assert torch.equal(probs, native)
