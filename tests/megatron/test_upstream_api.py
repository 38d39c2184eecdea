"""Actions set by hand through megatron-core's own ``RouterReplay`` work as they do upstream."""

import inspect
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch

import megatron_r3
from tests.megatron.foreign_routes import RouterWitness, foreign_routes
from tests.megatron.micro_batches import MIXED, MicroBatch, forward, padded_micro_batches
from tests.megatron.test_foreign_routes import RECOMPUTE, assert_used, layout_of, replay_foreign
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


class OwnAction(Enum):
    """As verl's, an enum of its own with upstream's values."""

    RECORD = "record"
    REPLAY_FORWARD = "replay_forward"
    REPLAY_BACKWARD = "replay_backward"


def set_action(model: Any, action: Any) -> None:
    for handle in handles_of(model):
        handle.set_router_replay_action(action)


def handles_of(model: Any) -> list[Any]:
    return [layer.mlp.router.router_replay for layer in model.decoder.layers[1:]]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64"])
def test_actions_of_another_enum_and_targets_of_any_integer_type_are_followed(
    model: Any, dtype: str
) -> None:
    [batch] = padded_micro_batches(MIXED[:1])
    witness = RouterWitness(micro_batch=0).watch(model)
    targets = targets_of(model, batch)
    for handle, target in zip(handles_of(model), targets, strict=True):
        handle.set_target_indices(target.to(getattr(torch, dtype)))
    set_action(model, OwnAction.REPLAY_FORWARD)
    loss = forward(model, batch).sum()
    # Frameworks look at what they have set.
    for handle, target in zip(handles_of(model), targets, strict=True):
        assert handle.router_replay_action is OwnAction.REPLAY_FORWARD
        assert handle.target_topk_idx.dtype == getattr(torch, dtype)
        assert torch.equal(handle.replay_backward_list[0].long(), target)
    set_action(model, OwnAction.REPLAY_BACKWARD)
    loss.backward()
    for layer, target in enumerate(targets):
        assert torch.equal(witness.forwards[0, layer], as_map(target))
        assert torch.equal(witness.recomputes[0, layer], as_map(target))
    assert [handle.replay_backward_list for handle in handles_of(model)] == [[]] * 3


def disturb_recomputes(model: Any) -> None:
    for router in (layer.mlp.router for layer in model.decoder.layers[1:]):

        def disturbed(hidden: Any, stock: Any = router.gating) -> Any:
            logits = stock(hidden)
            in_backward = torch._C._current_graph_task_id() != -1
            return logits + torch.randn_like(logits) if in_backward else logits

        router.gating = disturbed


def missing_routes_fall_back(stock: Any) -> Any:
    """What a framework wraps around upstream's method: rows of -1 route natively."""

    def get_replay_topk(self: Any, scores: Any, topk: int, *args: Any, **kwargs: Any) -> Any:
        target = self.target_topk_idx
        if self.router_replay_action.value == "replay_forward":
            own = torch.topk(scores.detach(), topk, dim=1).indices
            self.target_topk_idx = torch.where(target < 0, own, target)
            self.replay_backward_list[-1] = self.target_topk_idx
        result = stock(self, scores, topk, *args, **kwargs)
        self.target_topk_idx = target
        return result

    return get_replay_topk


@pytest.mark.parametrize("way", ["mask", "wrapper"])
def test_rows_left_out_route_natively_and_are_recomputed_as_they_ran(
    model: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    batches = padded_micro_batches()
    disturb_recomputes(model)
    native = RouterWitness(micro_batch=0).watch(model)
    with torch.no_grad():
        forward(model, batches[0])
    own = native.forwards[0, 0]
    for hook in native.hooks:
        hook.remove()
    if way == "wrapper":
        wrapped = missing_routes_fall_back(RouterReplay.get_replay_topk)
        monkeypatch.setattr(RouterReplay, "get_replay_topk", wrapped)
    witness = RouterWitness().watch(model)
    losses = []
    masks = [torch.arange(batch.tokens.numel()) % 3 > 0 for batch in batches]
    set_action(model, OwnAction.REPLAY_FORWARD)
    for number, batch in enumerate(batches):
        witness.micro_batch = number
        for handle, target in zip(handles_of(model), targets_of(model, batch), strict=True):
            if way == "mask":
                handle.set_target_indices(target, replay_mask=masks[number])
            else:
                handle.set_target_indices(target.masked_fill(~masks[number][:, None], -1))
        losses.append(forward(model, batch).sum())
    set_action(model, OwnAction.REPLAY_BACKWARD)
    for number, loss in enumerate(losses):
        witness.micro_batch = number
        loss.backward()
    for number, batch in enumerate(batches):
        for layer, target in enumerate(targets_of(model, batch)):
            used = witness.forwards[number, layer]
            assert torch.equal(used[masks[number]], as_map(target)[masks[number]])
            assert torch.equal(witness.recomputes[number, layer], used)
    assert torch.equal(witness.forwards[0, 0][~masks[0]], own[~masks[0]])


def test_a_wrapper_around_upstreams_method_sees_every_choice(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    seen: list[torch.Tensor] = []
    stock = RouterReplay.get_replay_topk

    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        seen.append(as_map(result[1]))
        return result

    monkeypatch.setattr(RouterReplay, "get_replay_topk", observed)
    [batch] = padded_micro_batches(MIXED[:1])
    witness = RouterWitness(micro_batch=0).watch(model)
    megatron_r3.detach(model)
    controller = megatron_r3.attach(model)
    with controller.schedule("replay"):
        routes = foreign_routes(controller.layout, batch.lengths)
        controller.feed(model, routes, host_lengths=batch.lengths, seq_length=batch.width)
        forward(model, batch).sum().backward()
    witness.micro_batch = 1
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    forward(model, batch)
    RouterReplay.clear_global_router_replay_action()
    witness.micro_batch = 2
    forward(model, batch)
    calls = [(0, layer) for layer in range(3)]
    used = [witness.forwards[call] for call in calls]
    # A checkpoint of two layers is recomputed after the one behind it.
    used += [witness.recomputes[0, layer] for layer in (1, 2, 0)]
    used += [witness.forwards[number, layer] for number in (1, 2) for layer in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(seen, used, strict=True))


def test_records_go_to_a_static_buffer_where_one_is_set(model: Any) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    [batch] = padded_micro_batches(MIXED[:1])
    witness = RouterWitness(micro_batch=0).watch(model)
    buffer = torch.full((32, 3, 4), -1, dtype=torch.int32)
    for layer, handle in enumerate(handles_of(model)):
        handle.set_static_buffer(buffer[:, layer])
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    forward(model, batch)
    for layer, recorded in enumerate(RouterReplay.get_recorded_data()):
        assert recorded.data_ptr() == buffer[:, layer].data_ptr()
        assert torch.equal(as_map(buffer[:24, layer].long()), witness.forwards[0, layer])
        assert (buffer[24:] == -1).all()
    for handle in handles_of(model):
        handle.clear_static_buffer()
        assert handle.static_buffer is None


def test_frames_answer_after_the_global_list_was_cleared(model: Any) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    RouterReplay.clear_global_router_replay_instances()
    megatron_r3.detach(model)
    controller = megatron_r3.attach(model)
    RouterReplay.clear_global_router_replay_instances()
    batches = padded_micro_batches()
    witness, _ = replay_foreign(model, batches, controller=controller)
    assert_used(witness, batches, layout_of(model), 3)
    controller.detach()
    assert RouterReplay.global_router_replay_instances == []


def test_a_handle_has_what_frameworks_touch(model: Any) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    for number, handle in enumerate(handles_of(model)):
        assert isinstance(handle, RouterReplay)
        assert RouterReplay.global_router_replay_instances[number] is handle
        assert handle.layer_number == number + 2
        assert list(inspect.signature(handle.get_replay_topk).parameters) == [
            "scores",
            "topk",
            "num_groups",
            "group_topk",
            "default_compute_topk",
        ]
        for name in ("target_topk_idx", "target_replay_mask", "recorded_topk_idx"):
            assert getattr(handle, name) is None
        assert (handle.router_replay_action, handle.static_buffer) == (None, None)
        handle.set_target_indices(torch.zeros(1, 4))
        handle.replay_backward_list[-1] = handle.replay_backward_list[0] + 1
        assert (len(handle.replay_backward_list), len(handle.replay_backward_mask_list)) == (1, 1)
        handle.clear_indices()
        assert (handle.replay_backward_list, handle.replay_backward_mask_list) == ([], [])
        handle.own_attribute = number


@pytest.mark.parametrize("kind", ["short", "narrow", "missing", "empty_queue", "floats", "mask"])
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
    elif kind == "floats":
        RouterReplay.set_replay_data([target.float() for target in targets])
    elif kind == "mask":
        for handle, target in zip(handles_of(model), targets, strict=True):
            handle.set_target_indices(target, replay_mask=torch.ones(23, dtype=torch.bool))
    RouterReplay.set_global_router_replay_action(action)
    message = {
        "short": r"target of .* is of shape \(23, 4\), expected \(24, 4\)",
        "narrow": r"target of .* is of shape \(24, 3\), expected \(24, 4\)",
        "floats": r"has dtype torch.float32, expected integers",
        "mask": r"mask of .* is of shape \(23,\), expected \(24,\)",
    }.get(kind, r"is missing, expected \(24, 4\)")
    with pytest.raises(megatron_r3.InvalidRoutesError, match=message):
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
