"""What replay means for padding, auxiliary losses, the expert bias and dispatchers."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import megatron_r3
from megatron_r3.policies import spread_experts
from tests.megatron.foreign_routes import RouterWitness, foreign_routes
from tests.megatron.gloo_pool import GlooPool
from tests.megatron.micro_batches import MIXED, MicroBatch, forward_backward, padded_micro_batches
from tests.megatron.test_foreign_routes import assert_used, layout_of, replay_foreign
from tests.megatron.test_own_record import RECOMPUTE, SCORES
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config

LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
WITH_LOSSES = {
    "moe_router_load_balancing_type": list(LOSSES),
    "moe_aux_loss_coeff": [0.01, 0.02, 0.03],
}


@pytest.fixture(autouse=True)
def auxiliary_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron keeps the scale in a class, in the shape in which it was first seen."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)


def build(**overrides: Any) -> Any:
    return tiny_chunks(tiny_config(**overrides))[0]


def routers_of(model: Any) -> list[Any]:
    return [layer.mlp.router for layer in model.decoder.layers[1:]]


def watch_losses(model: Any) -> dict[tuple[int, str], torch.Tensor]:
    """The auxiliary losses that Megatron attaches, by layer on the L axis and name."""
    losses = {}
    for layer, router in enumerate(routers_of(model)):

        def attach(
            activation: Any,
            coeff: Any,
            loss: torch.Tensor,
            name: str,
            *args: Any,
            stock: Any = router.attach_and_log_load_balancing_loss,
            layer: int = layer,
            **kwargs: Any,
        ) -> Any:
            key = "aux_loss" if name == "load_balancing_loss" else name.split("_")[0] + "_aux_loss"
            losses[layer, key] = loss.detach().clone()
            return stock(activation, coeff, loss, name, *args, **kwargs)

        router.attach_and_log_load_balancing_loss = attach
    return losses


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def replay(
    model: Any, batch: MicroBatch, foreign: bool = True, **policies: Any
) -> tuple[RouterWitness, dict[str, torch.Tensor]]:
    """Replay foreign routes, or what the model itself chooses; the calls and the gradients."""
    controller = megatron_r3.attach(model, **policies)
    routes: Any = foreign_routes(controller.layout, batch.lengths)
    if not foreign:
        with controller.schedule("record") as recording, torch.no_grad():
            controller.feed(model, host_lengths=batch.lengths, seq_length=batch.width)
            forward_backward(model, [batch], order=())
        routes = recording[0]
    witness = RouterWitness(micro_batch=0).watch(model)
    with controller.schedule("replay"):
        controller.feed(model, routes, host_lengths=batch.lengths, seq_length=batch.width)
        forward_backward(model, [batch], order=(0,))
    for hook in witness.hooks:
        hook.remove()
    controller.detach()
    return witness, gradients(model)


def keep_logits(gating: Any, logits: dict[int, torch.Tensor], layer: int) -> Any:
    def kept(hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = gating(hidden)
        logits[layer] = found.detach().flatten(0, 1)
        return found

    return kept


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_auxiliary_losses_count_live_or_replayed_experts_or_nothing(
    world_of_one: None, recompute: str
) -> None:
    """Against Megatron's own numbers, in the first MoE layer, which sees the same input."""
    [batch] = padded_micro_batches(MIXED[:1])
    model = build(**WITH_LOSSES, **RECOMPUTE[recompute])
    without = build(**RECOMPUTE[recompute])
    without.load_state_dict(model.state_dict(), strict=False)
    losses = watch_losses(model)

    def reset() -> None:
        losses.clear()
        for router in routers_of(model):
            router.reset_global_aux_loss_tracker()

    forward_backward(model, [batch], order=(0,))
    native, native_gradients = dict(losses), gradients(model)
    assert {name for _, name in native} == set(LOSSES)

    reset()
    _, live_gradients = replay(model, batch)
    live = dict(losses)
    assert all(torch.equal(live[0, name], native[0, name]) for name in LOSSES)

    reset()
    _, own_gradients = replay(model, batch, foreign=False, aux_loss="replayed")
    assert all(torch.equal(losses[key], native[key]) for key in native)
    # Without gradients 0.19.2 does not sort the top-k, so that sums run in another order.
    torch.testing.assert_close(own_gradients, native_gradients)

    reset()
    logits: dict[int, torch.Tensor] = {}
    for layer, router in enumerate(routers_of(model)):
        router.gating = keep_logits(router.gating, logits, layer)
    witness, replayed_gradients = replay(model, batch, aux_loss="replayed")
    for layer in range(3):
        # E / (k T²) Σ_e (tokens of e) (Σ_t probability of e), with one sequence for each sample.
        used = witness.forwards[0, layer].float()
        probabilities = torch.softmax(logits[layer], -1)
        tokens, experts = used.shape
        for name, coeff in zip(LOSSES, WITH_LOSSES["moe_aux_loss_coeff"], strict=True):
            parts = (
                [slice(n, None, 2) for n in range(2)] if name == "seq_aux_loss" else [slice(None)]
            )
            expected = 0.0
            for part in parts:
                rows = tokens // len(parts)
                both = used[part].sum(0) * probabilities[part].sum(0)
                expected += float(both.sum()) * experts * coeff / (4 * rows**2) / len(parts)
            assert float(losses[layer, name]) == pytest.approx(expected, rel=1e-4)
        if layer == 0:
            assert not torch.equal(losses[0, "aux_loss"], live[0, "aux_loss"])
    assert any(not torch.equal(replayed_gradients[n], live_gradients[n]) for n in live_gradients)

    reset()
    _, off_gradients = replay(model, batch, aux_loss="off")
    assert losses == {}
    _, no_gradients = replay(without, batch)
    assert all(torch.equal(off_gradients[name], no_gradients[name]) for name in no_gradients)

    forward_backward(model, [batch], order=(0,))
    assert set(losses) == set(native)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("counts", ["all", "tokens", "replayed"])
def test_the_expert_bias_counts_the_rows_that_the_policy_names(
    world_of_one: None, counts: str, recompute: str
) -> None:
    [batch] = padded_micro_batches(MIXED[:1])
    model = build(**SCORES["sigmoid_with_bias"], **RECOMPUTE[recompute])
    witness, _ = replay(model, batch, bias_counts=counts)
    counted = [
        counts == "all"
        or (cell is not None and (counts == "tokens" or cell[1] < batch.lengths[cell[0]] - 1))
        for cell in batch.cells()
    ]
    assert sum(counted) == {"all": 24, "tokens": 14, "replayed": 12}[counts]
    for layer, router in enumerate(routers_of(model)):
        expected = witness.forwards[0, layer][torch.tensor(counted)].sum(0)
        assert torch.equal(router.local_tokens_per_expert, expected.float())


def test_a_padding_mask_of_the_model_is_honoured_by_the_expert_bias(world_of_one: None) -> None:
    """Releases up to 0.19.2 fail on it by themselves."""
    model = build(**SCORES["sigmoid_with_bias"])
    controller = megatron_r3.attach(model)
    router = routers_of(model)[0]
    padding = torch.zeros(6, 2, dtype=torch.bool)
    padding[4:, 1] = True
    _, used = router(torch.randn(6, 2, 64), padding_mask=padding)
    assert torch.equal(router.local_tokens_per_expert, used[~padding.flatten()].sum(0).float())
    controller.detach()


@pytest.mark.parametrize("ep_size", [1, 2, 8])
@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (16, 16), (64, 6), (384, 8)])
def test_spread_padding_meets_every_expert_and_rank_as_often(
    experts: int, top_k: int, ep_size: int
) -> None:
    layers = [0, 1, 5]
    ids = spread_experts(37, layers, experts, top_k, ep_size)
    assert ids.shape == (3, 37, top_k)
    assert (np.diff(np.sort(ids, axis=2), axis=2) > 0).all()
    for layer in ids:
        tokens = np.bincount(layer.flatten(), minlength=experts)
        assert tokens.max() - tokens.min() <= 1
        for row in layer:
            ranks = np.bincount(row // (experts // ep_size), minlength=ep_size)
            assert ranks.max() - ranks.min() <= 1
    if top_k < experts:
        first = spread_experts(1, range(experts // top_k), experts, top_k, ep_size)
        other = spread_experts(1, [0], experts, top_k, ep_size, ep_rank=1)
        assert len({tuple(sorted(layer[0])) for layer in first}) == experts // top_k
        assert set(other[0, 0]) != set(first[0, 0])


def padding_of_a_rank(padding: str) -> list[list[list[int]]]:
    """Experts of each padding row in each layer, under expert parallelism."""
    [batch] = padded_micro_batches(MIXED[:1])
    [model] = tiny_chunks(tiny_config(moe_token_dispatcher_type="alltoall"))
    witness, _ = replay(model, batch, padding=padding)
    rows = torch.tensor([cell is None for cell in batch.cells()])
    return [
        [torch.nonzero(row).flatten().tolist() for row in witness.forwards[0, layer][rows]]
        for layer in range(3)
    ]


def test_padding_is_spread_over_expert_parallel_ranks(gloo_2: GlooPool) -> None:
    ranks = gloo_2.run(padding_of_a_rank, "spread", expert_model_parallel_size=2)
    for layers in zip(*ranks, strict=True):
        assert layers[0] != layers[1]
        for rows in layers:
            assert len(rows) == 10
            # Ten rows of four experts meet each of the sixteen two or three times.
            assert set(np.bincount(np.concatenate(rows), minlength=16)) <= {2, 3}
            assert all(sum(expert < 8 for expert in row) == 2 for row in rows)
    # Sixteen experts in steps of four: the fourth layer of the first rank would begin again.
    assert len({str(layer) for rank in ranks for layer in rank}) == 4


def test_spread_padding_leaves_tokens_as_they_are(world_of_one: None) -> None:
    [batch] = padded_micro_batches(MIXED[:1])
    model = build(**RECOMPUTE["full"])
    native, _ = replay(model, batch)
    spread, _ = replay(model, batch, padding="spread")
    tokens = torch.tensor([cell is not None for cell in batch.cells()])
    for call, used in native.forwards.items():
        assert torch.equal(spread.forwards[call][tokens], used[tokens])
        assert torch.equal(spread.recomputes[call], spread.forwards[call])


@pytest.mark.parametrize("policy", ["padding", "aux_loss", "bias_counts"])
def test_an_unknown_policy_is_named(world_of_one: None, policy: str) -> None:
    with pytest.raises(megatron_r3.ReplayStateError, match=rf"{policy} is 'x', expected one of"):
        megatron_r3.attach(build(), **{policy: "x"})


ACCEPTED: dict[str, dict[str, Any]] = {
    "forced_load_balancing": {"moe_router_force_load_balancing": True},
    "input_jitter": {"moe_input_jitter_eps": 0.1},
    "forced_bias": {"moe_router_force_biased": 1.0},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_disturbances_of_the_logits_leave_the_route_alone(
    world_of_one: None, name: str
) -> None:
    model = build(**RECOMPUTE["full"])
    for field, value in ACCEPTED[name].items():
        setattr(model.config, field, value)
    controller = megatron_r3.attach(model, accept={name})
    batches = padded_micro_batches()
    witness, _ = replay_foreign(model, batches, controller=controller)
    assert_used(witness, batches, layout_of(model), 3)


def test_an_accepted_capacity_factor_drops_replayed_experts_and_no_others(
    world_of_one: None,
) -> None:
    [batch] = padded_micro_batches(MIXED[:1])
    dropping = build(
        moe_expert_capacity_factor=0.5,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
    )
    whole, _ = replay(build(), batch)
    dropped, _ = replay(dropping, batch, accept={"capacity_factor"})
    routes = torch.tensor([cell is not None for cell in batch.cells()])
    used, all_used = dropped.forwards[0, 0][routes], whole.forwards[0, 0][routes]
    assert 0 < used.sum() < all_used.sum()


def test_routers_left_native_run_in_a_replay(world_of_one: None) -> None:
    [batch] = padded_micro_batches(MIXED[:1])
    model = build()
    native = RouterWitness(micro_batch=0).watch(model)
    routers_of(model)[0].routing_type = "sinkhorn"
    forward_backward(model, [batch], order=(0,))
    own = native.forwards[0, 0]
    for hook in native.hooks:
        hook.remove()
    witness, _ = replay(model, batch, accept={"sinkhorn"})
    assert torch.equal(witness.forwards[0, 0], own)
    layout = layout_of(model)
    routes = foreign_routes(layout, batch.lengths)
    for layer in (1, 2):
        used = torch.nonzero(witness.forwards[0, layer][0]).flatten().tolist()
        assert used == sorted(routes[0].ids[0, layer].tolist())


def test_padding_for_quantization_adds_rows_behind_the_router_only(world_of_one: None) -> None:
    [batch] = padded_micro_batches(MIXED[:1])
    model = build(moe_token_dispatcher_type="alltoall", **RECOMPUTE["full"])
    plain, plain_gradients = replay(model, batch)
    rows: list[int] = []
    for layer in model.decoder.layers[1:]:
        dispatcher = layer.mlp.token_dispatcher
        dispatcher.config = copy.copy(dispatcher.config)
        dispatcher.config.moe_router_padding_for_quantization = True
        dispatcher.config.fp8, dispatcher.config.fp8_recipe = "e4m3", "delayed"
        dispatcher.drop_and_pad = False

        def preprocess(routing_map: torch.Tensor, stock: Any = dispatcher.preprocess) -> Any:
            rows.extend(routing_map.sum(0).tolist())
            return stock(routing_map)

        dispatcher.preprocess = preprocess
    padded, padded_gradients = replay(model, batch)
    assert len(rows) == 2 * 3 * 16
    assert {count % 16 for count in rows} == {0}
    for call in plain.forwards:
        assert torch.equal(padded.forwards[call], plain.forwards[call])
        assert torch.equal(padded.recomputes[call], plain.recomputes[call])
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient)


def indices_of_a_dispatcher(
    manager: str, probs: torch.Tensor, routing_map: torch.Tensor
) -> Sequence[set[int]]:
    """What a dispatcher that runs top-k again on the probabilities sends each row to."""
    from megatron.core.transformer.moe import token_dispatcher

    made: Any = object.__new__(getattr(token_dispatcher, manager))
    made.router_topk, made.num_experts, made.capacity_factor = 4, 16, None
    made.setup_metadata(routing_map, probs)
    return [set(row) for row in made.token_indices.tolist()]


@pytest.mark.parametrize("scores", ["softmax_after", "sigmoid_with_bias"])
def test_dispatchers_that_select_again_select_the_replayed_experts(
    world_of_one: None, scores: str
) -> None:
    """Also where a replayed expert's probability is so small that it underflows to 0."""
    model = build(**SCORES[scores], **RECOMPUTE["none"])
    router = routers_of(model)[0]
    with torch.no_grad():
        router.weight.mul_(1e4)
    hidden = torch.randn(8, 2, 64, requires_grad=True)
    routes = foreign_routes(layout_of(model), (8, 8))

    def run(dispatcher: str) -> tuple[torch.Tensor, torch.Tensor]:
        model.config.moe_token_dispatcher_type = dispatcher
        controller = megatron_r3.attach(model)
        with controller.schedule("replay"):
            controller.feed(model, routes, host_lengths=(8, 8))
            for other in routers_of(model)[1:]:
                other(hidden)
            probs, routing_map = router(hidden)
        controller.detach()
        return probs, routing_map

    stock, _ = run("allgather")
    for dispatcher, follows in (("allgather", False), ("flex", True)):
        probs, routing_map = run(dispatcher)
        assert (probs[routing_map] == 0).any() != follows
        sent = indices_of_a_dispatcher("_DeepepManager", probs, routing_map)
        expected = [set(torch.nonzero(row).flatten().tolist()) for row in routing_map]
        assert (sent == expected) == follows
        torch.testing.assert_close(probs, stock, rtol=0, atol=1e-30)
        probs.sum().backward()
    model.config.moe_flex_dispatcher_backend = "hybridep"
    probs, routing_map = run("flex")
    assert (probs[routing_map] == 0).any()


def test_a_router_that_hashes_is_refused_by_name(world_of_one: None) -> None:
    model = build()
    routers_of(model)[0].is_hash_layer = True
    with pytest.raises(megatron_r3.UnsupportedRouterError, match=r"hash_layer: .*\(layers \[2\]\)"):
        megatron_r3.attach(model)
    report = megatron_r3.attach(model, accept={"hash_layer"}).report
    assert [router.accepted for router in report.native] == [("hash_layer",)]
