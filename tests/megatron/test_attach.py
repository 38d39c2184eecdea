"""Attaching is invisible to everything but routing, is undone by detaching, and refuses by name."""

import copy
import gc
import io
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import megatron_r3
from megatron_r3 import LayoutMismatchError, ReplayStateError, UnsupportedRouterError
from megatron_r3.refusals import REFUSALS
from shared_schema import RoutingLayout
from tests.megatron.foreign_routes import RouterWitness, foreign_routes
from tests.megatron.micro_batches import MIXED, forward, padded_micro_batches
from tests.megatron.test_foreign_routes import assert_used, layout_of, replay_foreign
from tests.megatron.tiny_gpt import SEQ, VOCAB, tiny_chunks, tiny_config


def build(**overrides: Any) -> Any:
    return tiny_chunks(tiny_config(**overrides))[0]


def routers_of(model: Any) -> list[Any]:
    from megatron.core.transformer.moe.router import Router

    return [module for module in model.modules() if isinstance(module, Router)]


@pytest.fixture
def upstream_list(world_of_one: None) -> Iterator[list[Any]]:
    """megatron-core's global list of replay instances, empty before and after."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    RouterReplay.global_router_replay_instances.clear()
    yield RouterReplay.global_router_replay_instances
    RouterReplay.global_router_replay_instances.clear()


@pytest.mark.parametrize("flag", [False, True], ids=["flag_off", "flag_on"])
def test_detach_restores_what_attach_found(upstream_list: list[Any], flag: bool) -> None:
    model = build(moe_enable_routing_replay=flag)
    before = [(type(r), r.router_replay, r.config) for r in routers_of(model)]
    instances = list(upstream_list)
    assert len(instances) == (3 if flag else 0)
    controller = megatron_r3.attach(model)
    handles = [router.router_replay for router in routers_of(model)]
    assert upstream_list == (handles if flag else [])
    controller.detach()
    assert [(type(r), r.router_replay, r.config) for r in routers_of(model)] == before
    assert all(now is then for now, then in zip(upstream_list, instances, strict=True))
    megatron_r3.attach(model)
    megatron_r3.detach(model)
    assert [(type(r), r.router_replay, r.config) for r in routers_of(model)] == before


def test_a_replaying_router_passes_for_the_stock_one(world_of_one: None) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    model = build()
    megatron_r3.attach(model)
    for router in routers_of(model):
        assert isinstance(router, TopKRouter)
        assert isinstance(router, megatron_r3.ReplayTopKRouter)
        for name in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(router), name) == getattr(TopKRouter, name)


def test_a_routers_own_class_stays_in_its_ancestry(world_of_one: None) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    class OwnRouter(TopKRouter):
        pass

    model = build()
    for router in routers_of(model):
        router.__class__ = OwnRouter
    controller = megatron_r3.attach(model)
    assert all(isinstance(router, OwnRouter) for router in routers_of(model))
    assert {type(router).__qualname__ for router in routers_of(model)} == {OwnRouter.__qualname__}
    controller.detach()
    assert all(type(router) is OwnRouter for router in routers_of(model))


def test_checkpoints_are_the_same_and_load_while_attached(world_of_one: None) -> None:
    bias = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    model, other = build(**bias), build(**bias)
    keys, sharded = list(model.state_dict()), list(model.sharded_state_dict())
    megatron_r3.attach(model)
    assert list(model.state_dict()) == keys
    assert list(model.sharded_state_dict()) == sharded

    with torch.no_grad():
        for router in routers_of(model):
            router.expert_bias.uniform_()
    buffer = io.BytesIO()
    torch.save({k: v for k, v in model.state_dict().items() if torch.is_tensor(v)}, buffer)
    buffer.seek(0)
    megatron_r3.attach(other)
    other.load_state_dict(torch.load(buffer), strict=False)
    for name, tensor in model.state_dict().items():
        if torch.is_tensor(tensor):
            assert torch.equal(other.state_dict()[name], tensor)


def test_the_report_names_every_router(world_of_one: None) -> None:
    report = megatron_r3.attach(build()).report
    assert [router.name for router in report.replayed] == [
        f"decoder.layers.{layer}.mlp.router" for layer in (1, 2, 3)
    ]
    assert [router.layer for router in report.replayed] == [2, 3, 4]
    assert [router.index for router in report.replayed] == [0, 1, 2]
    assert report.native == ()
    assert report.layout == RoutingLayout(16, 4, (1, 2, 3), 4)
    assert "routing replay on 3 of 3 MoE layers (E=16, k=4)" in str(report)


def test_a_second_controller_is_refused_until_the_first_is_detached(world_of_one: None) -> None:
    model = build()
    controller = megatron_r3.attach(model)
    with pytest.raises(ReplayStateError, match="already belongs to a controller"):
        megatron_r3.attach(model)
    controller.detach()
    megatron_r3.attach(model)


def test_two_models_in_one_process_do_not_meet(world_of_one: None) -> None:
    first, second, batches = build(), build(), padded_micro_batches()
    controller = megatron_r3.attach(first)
    witness = RouterWitness(micro_batch=0).watch(second)
    forward(second, batches[0])
    native, witness.forwards = witness.forwards, {}
    megatron_r3.attach(second)
    with controller.schedule("replay"):
        controller.feed(
            first,
            foreign_routes(controller.layout, batches[0].lengths),
            host_lengths=batches[0].lengths,
            seq_length=batches[0].width,
        )
        forward(second, batches[0])
        assert all(torch.equal(witness.forwards[call], native[call]) for call in native)
        forward(first, batches[0])
    controller.detach()
    witness_of_first, _ = replay_foreign(first, batches)
    assert_used(witness_of_first, batches, layout_of(first), 0)


def test_a_controller_does_not_keep_its_model_alive(world_of_one: None) -> None:
    model = build()
    controller = megatron_r3.attach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    controller.detach()


def test_a_copy_of_an_attached_router_is_a_stock_one(world_of_one: None) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    model, [batch] = build(), padded_micro_batches(MIXED[:1])
    controller = megatron_r3.attach(model)
    for router in routers_of(model):
        # Process groups cannot be copied; the router alone is what is asked about.
        groups = {n: v for n, v in vars(router).items() if n.endswith("_group")}
        twin = copy.deepcopy(router, {id(group): group for group in groups.values()})
        assert type(twin) is TopKRouter
        assert twin.router_replay is not router.router_replay
        assert twin.router_replay.calls is None
        with controller.schedule("replay"):
            hidden = torch.randn(4, 1, 64)
            twin(hidden)
            controller.feed(
                model,
                foreign_routes(controller.layout, batch.lengths),
                host_lengths=batch.lengths,
                seq_length=batch.width,
            )
            forward(model, batch)


def test_the_flag_builds_replaying_routers_after_install(upstream_list: list[Any]) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    stock = TopKRouter.__init__
    megatron_r3.install()
    megatron_r3.install()
    try:
        model, without = build(moe_enable_routing_replay=True), build()
    finally:
        megatron_r3.uninstall()
    assert TopKRouter.__init__ is stock
    assert all(isinstance(r, megatron_r3.ReplayTopKRouter) for r in routers_of(model))
    assert all(type(r) is TopKRouter for r in routers_of(without))
    assert upstream_list == [router.router_replay for router in routers_of(model)]
    batches = padded_micro_batches()
    witness, _ = replay_foreign(model, batches)
    assert_used(witness, batches, layout_of(model), 0)
    megatron_r3.detach(model)
    assert all(isinstance(r, megatron_r3.ReplayTopKRouter) for r in routers_of(model))
    assert all(r.router_replay.calls is None for r in routers_of(model))


def test_routers_of_multi_token_prediction_stay_native(world_of_one: None) -> None:
    model = build(mtp_num_layers=1)
    controller = megatron_r3.attach(model)
    assert [router.name.split(".")[0] for router in controller.report.native] == ["mtp"]
    assert [router.layer for router in controller.report.replayed] == [2, 3, 4]
    witness = RouterWitness(micro_batch=0).watch(model.decoder)
    tokens = torch.randint(0, VOCAB, (2, SEQ))
    positions = torch.arange(SEQ).expand(2, SEQ)
    mask = torch.triu(torch.ones(SEQ, SEQ, dtype=torch.bool), 1)[None, None]
    routes = foreign_routes(controller.layout, (SEQ, SEQ))
    with controller.schedule("replay") as schedule:
        controller.feed(model, routes, host_lengths=(SEQ, SEQ))
        model(tokens, positions, mask, labels=tokens).sum().backward()
    assert schedule.report.rows.replayed == 2 * (SEQ - 1)
    for layer in range(3):
        for sample, routed in enumerate(routes):
            for position in range(SEQ - 1):
                used = torch.nonzero(witness.forwards[0, layer][position * 2 + sample]).flatten()
                assert used.tolist() == sorted(routed.ids[position, layer].tolist())


REFUSED: dict[str, dict[str, Any]] = {
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    "capacity_factor": {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_expert_capacity_factor": 1.0,
        "moe_token_dispatcher_type": "alltoall",
    },
    "forced_load_balancing": {"moe_router_force_load_balancing": True},
    "input_jitter": {"moe_input_jitter_eps": 0.1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_router_that_cannot_be_replayed_is_refused_by_name(world_of_one: None, name: str) -> None:
    model = build(**REFUSED[name])
    with pytest.raises(UnsupportedRouterError, match=rf"{name}: .*\(layers \[2, 3, 4\]\)"):
        megatron_r3.attach(model)
    assert not any(isinstance(r, megatron_r3.ReplayTopKRouter) for r in routers_of(model))
    controller = megatron_r3.attach(model, accept={name})
    routers = controller.report.replayed + controller.report.native
    assert [router.accepted for router in routers] == [(name,)] * 3
    assert len(controller.report.native) == (3 if name == "sinkhorn" else 0)


CONFIGURED_LATER: dict[str, dict[str, Any]] = {
    "fused_router": {"moe_router_fusion": True},
    "forced_bias": {"moe_router_force_biased": 1.0},
    "cuda_graph": {"cuda_graph_impl": "local"},
    "expert_parallel_overlap": {"overlap_moe_expert_parallel_comm": True},
}


@pytest.mark.parametrize("name", CONFIGURED_LATER)
def test_what_needs_a_gpu_to_run_is_refused_by_its_config(world_of_one: None, name: str) -> None:
    model = build()
    for field, value in CONFIGURED_LATER[name].items():
        setattr(model.config, field, value)
    with pytest.raises(UnsupportedRouterError, match=rf"{name}: "):
        megatron_r3.attach(model)
    megatron_r3.attach(model, accept={name})


def test_quantile_balancing_is_refused(world_of_one: None) -> None:
    model = build()
    for router in routers_of(model):
        router.routing_type = "quantile_balancing"
    with pytest.raises(UnsupportedRouterError, match="quantile_balancing: "):
        megatron_r3.attach(model)


def test_every_refusal_is_tested() -> None:
    tested = {*REFUSED, *CONFIGURED_LATER, "quantile_balancing", "hash_layer"}
    assert tested == {refusal.name for refusal in REFUSALS}


def test_accepting_a_fused_router_unfuses_it_while_attached(world_of_one: None) -> None:
    model, batches = build(), padded_micro_batches()
    # Without Transformer Engine the flag cannot be set before the build, nor the model run.
    model.config.moe_router_fusion = True
    controller = megatron_r3.attach(model, accept={"fused_router"})
    assert not any(router.config.moe_router_fusion for router in routers_of(model))
    assert model.config.moe_router_fusion
    with controller.schedule("replay"):
        controller.feed(
            model,
            foreign_routes(controller.layout, batches[0].lengths),
            host_lengths=batches[0].lengths,
            seq_length=batches[0].width,
        )
        forward(model, batches[0])
    controller.detach()
    assert all(router.config is model.config for router in routers_of(model))


def test_a_router_that_asks_for_no_target_is_named_in_its_first_forward(world_of_one: None) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    class HashRouter(TopKRouter):
        """Routes by a rule of its own."""

        def routing(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
            probs = torch.zeros_like(logits.flatten(0, 1))
            probs[:, :4] = 0.25
            return probs, probs > 0

    model, [batch] = build(), padded_micro_batches(MIXED[:1])
    for router in routers_of(model):
        router.__class__ = HashRouter
    controller = megatron_r3.attach(model)
    forward(model, batch)

    def replay() -> None:
        with controller.schedule("replay"):
            controller.feed(
                model,
                foreign_routes(controller.layout, batch.lengths),
                host_lengths=batch.lengths,
                seq_length=batch.width,
            )
            forward(model, batch)

    with pytest.raises(ReplayStateError, match="the router of layer 2 chose its experts without"):
        replay()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (RoutingLayout(16, 4, (1, 2), 4), r"routers in layers \[2, 3, 4\], expected 2"),
        (RoutingLayout(32, 4, (1, 2, 3), 4), "num_experts 32 instead of 16"),
        (RoutingLayout(16, 2, (1, 2, 3), 4), "top_k 2 instead of 4"),
    ],
)
def test_a_layout_of_another_model_is_refused(
    world_of_one: None, layout: RoutingLayout, message: str
) -> None:
    with pytest.raises(LayoutMismatchError, match=message):
        megatron_r3.attach(build(), layout=layout)


def test_an_unknown_name_to_accept_is_refused(world_of_one: None) -> None:
    with pytest.raises(UnsupportedRouterError, match=r"accept has \['fused'\], expected names"):
        megatron_r3.attach(build(), accept={"fused"})
