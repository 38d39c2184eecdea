"""The capture buffer holds what the routers chose, and shows it when one of them did not report."""

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from shared_schema import RoutingLayout
from vllm_r3_plugin.capturer import (
    RouterSource,
    RoutingCapturer,
    _router_attacher,
    capture_dtype,
    find_routers,
)
from vllm_r3_plugin.worker import _distinct_layers

MAX_TOKENS = 16


class GivenRouter(BaseRouter):
    """vLLM's router with a choice that is given instead of computed."""

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        return torch.ones(router_logits.shape), router_logits

    @property
    def routing_method_type(self):
        raise NotImplementedError

    def choose(self, ids):
        ids = torch.as_tensor(np.asarray(ids, np.int32))
        self._select_experts(ids, ids)


class Rig:
    """A capturer bound to one router for each layer."""

    def __init__(self, num_experts=64, top_k=2, layers=(1, 3)):
        layout = RoutingLayout(num_experts, top_k, layers, num_hidden_layers=max(layers) + 1)
        self.capturer = RoutingCapturer(layout, MAX_TOKENS, torch.device("cpu"))
        self.routers = [GivenRouter(top_k, num_experts) for _ in layers]
        self.sources = [
            RouterSource(layer, f"layers.{layer}", top_k, _router_attacher(router))
            for layer, router in zip(layers, self.routers, strict=True)
        ]
        self.capturer.bind(self.sources)

    def step(self, *choices, num_tokens=None):
        """Each router chooses ``choices[i]``; None is a router that does not run."""
        num_tokens = num_tokens or len(choices[0])
        self.capturer.arm(num_tokens)
        for router, ids in zip(self.routers, choices, strict=True):
            if ids is not None:
                router.choose(ids)
        ids = self.capturer.copy_rows(num_tokens).wait()
        return ids, self.capturer.unreported_layers(ids)


def distinct_ids(num_tokens, num_experts=64, top_k=2, seed=0):
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((num_tokens, num_experts)), axis=-1)[:, :top_k]


def test_rows_hold_each_layers_choice_in_the_routers_own_order():
    rig, a, b = Rig(), distinct_ids(5, seed=1), distinct_ids(5, seed=2)
    ids, unreported = rig.step(a, b)
    assert unreported == []
    assert ids.dtype == np.uint8
    assert (ids == np.stack([a, b], 1)).all()


def test_padding_rows_of_a_graph_are_left_out():
    rig, a = Rig(), distinct_ids(8)
    ids, unreported = rig.step(a, a, num_tokens=5)
    assert unreported == []
    assert (ids[:, 0] == a[:5]).all()


def test_what_was_returned_is_not_changed_by_the_next_step():
    rig, a = Rig(), distinct_ids(4, seed=1)
    first, _ = rig.step(a, a)
    rig.step(distinct_ids(4, seed=2), distinct_ids(4, seed=2))
    assert (first[:, 0] == a).all()


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_layer_that_did_not_run_never_passes_for_the_step_before(num_tokens):
    rig, a = Rig(), distinct_ids(num_tokens)
    assert rig.step(a, a)[1] == []
    assert rig.step(a, None)[1] == [3]


def test_a_layer_that_ran_on_part_of_the_tokens_is_noticed():
    rig, a = Rig(), distinct_ids(6)
    assert rig.step(a, a[:3])[1] == [3]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "dtype"),
    [(256, 2, np.uint8), (256, 1, np.uint16), (255, 1, np.uint8), (257, 2, np.uint16)],
)
def test_every_id_fits_and_none_is_taken_for_an_unwritten_row(num_experts, top_k, dtype):
    assert capture_dtype(num_experts, top_k) == dtype
    rig = Rig(num_experts, top_k)
    largest = np.arange(num_experts)[::-1][:top_k]
    ids, unreported = rig.step(np.tile(largest, (3, 1)), np.tile(largest, (3, 1)))
    assert unreported == []
    assert (ids == largest).all()
    assert rig.step(None, None, num_tokens=3)[1] == [1, 3]


def test_ids_beyond_fifteen_bits_are_kept():
    rig = Rig(num_experts=60_000, layers=(0,))
    ids, unreported = rig.step([[59_999, 40_000]])
    assert unreported == []
    assert ids.tolist() == [[[59_999, 40_000]]]


def test_whoever_listened_before_still_hears_the_router():
    rig, heard = Rig(), []
    router = rig.routers[0]
    router.set_capture_fn(heard.append)
    rig.capturer.bind(rig.sources)
    a = distinct_ids(3)
    ids, _ = rig.step(a, a)
    assert (heard[0].numpy() == a).all()
    assert (ids[:, 0] == a).all()


def test_binding_again_does_not_make_a_router_report_twice():
    rig, heard = Rig(), []
    rig.routers[0].set_capture_fn(heard.append)
    for _ in range(3):
        rig.capturer.bind(rig.sources)
    a = distinct_ids(3)
    rig.step(a, a)
    assert len(heard) == 1


def test_columns_of_fused_shared_experts_are_left_out():
    rig, a = Rig(), distinct_ids(3)
    with_shared = np.concatenate([a, np.full((3, 1), 64)], axis=1)
    ids, unreported = rig.step(with_shared, with_shared)
    assert unreported == []
    assert (ids[:, 0] == a).all()


def test_a_router_that_cannot_be_captured_is_an_error_that_names_its_layer():
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    runner = object.__new__(MoERunner)
    torch.nn.Module.__init__(runner)
    runner.layer_name = "model.layers.7.mlp.experts"
    runner.routed_experts = torch.nn.Module()
    runner.routed_experts.quant_method = type("Method", (), {"is_monolithic": False})()
    runner.router = torch.nn.Identity()
    runner.moe_config = type("Config", (), {"experts_per_token": 2})()
    model = torch.nn.Module()
    model.experts = runner
    with pytest.raises(ValueError, match=r"layer 'experts' .* Identity, expected a BaseRouter"):
        list(find_routers(model, num_hidden_layers=8, top_k=2))
    runner.routed_experts.quant_method.is_monolithic = True
    with pytest.raises(ValueError, match=r"layer 'experts' .* routes by itself"):
        list(find_routers(model, num_hidden_layers=8, top_k=2))


def test_a_layer_with_two_routers_is_refused_with_their_names():
    sources = [
        RouterSource(layer, f"layers.{layer}.{name}", 2, lambda capture: None)
        for layer, name in [(3, "experts"), (1, "text_experts"), (1, "vision_experts")]
    ]
    assert _distinct_layers(sources[:2]) == (1, 3)
    with pytest.raises(ValueError, match="layer 1 routes in") as error:
        _distinct_layers(sources)
    assert "'layers.1.text_experts' and in 'layers.1.vision_experts'" in str(error.value)
