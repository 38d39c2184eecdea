"""Wrong routes are named errors before the forward starts."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import megatron_r3
from megatron_r3 import LayoutPlan
from megatron_r3.layout_plan import token_identities
from shared_schema import RoutedExperts, RoutedExpertsBatch, RoutingLayout, encode
from tests.megatron.foreign_routes import RouterWitness, expected_map, foreign_routes
from tests.megatron.micro_batches import MIXED, forward, padded_micro_batches
from tests.megatron.tiny_gpt import tiny_chunks, tiny_config

LENGTHS = (9, 5)
LAYOUT = RoutingLayout(num_experts=16, top_k=4, moe_layers=(1, 2, 3), num_hidden_layers=4)


@pytest.fixture
def model(world_of_one: None) -> Any:
    return tiny_chunks(tiny_config())[0]


@pytest.fixture
def controller(model: Any) -> Any:
    return megatron_r3.attach(model)


@pytest.fixture
def replay(controller: Any) -> Iterator[Any]:
    """A controller in an open schedule that is left without a check, as an error leaves it."""
    with contextlib.suppress(InterruptedError), controller.schedule("replay"):
        yield controller
        raise InterruptedError


def unchecked(ids: np.ndarray, layout: RoutingLayout = LAYOUT) -> RoutedExperts:
    """Routes that the schema would refuse, as a faulty caller may hold them."""
    return RoutedExperts.trusted(ids, layout, 0, np.zeros(len(ids), np.uint8), ())


def edited(row: int, layer: int, experts: list[int]) -> list[RoutedExperts]:
    first, second = foreign_routes(LAYOUT, LENGTHS)
    ids = first.ids.copy()
    ids[row, layer] = experts
    return [unchecked(ids), second]


def other_layout(**fields: Any) -> RoutedExpertsBatch:
    return foreign_routes(RoutingLayout(**(LAYOUT.to_dict() | fields)), LENGTHS)


good = foreign_routes(LAYOUT, LENGTHS)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "too few rows": (
        [good[0][:6], good[1]],
        megatron_r3.RowCountError,
        "sample 0 has rows up to position 5, expected 7 or 8 for its 9 tokens",
    ),
    "too many rows": (
        [good[0], unchecked(np.tile(good[1].ids, (3, 1, 1)))],
        megatron_r3.RowCountError,
        "sample 1 has rows up to position 11, expected 3 or 4 for its 5 tokens",
    ),
    "a sample too few": (
        good.select([0]),
        megatron_r3.RowCountError,
        "routes for 1 samples, expected 2",
    ),
    "another k": (other_layout(top_k=5), megatron_r3.LayoutMismatchError, "top_k 5 instead of 4"),
    "another k in the array only": (
        [unchecked(good[0].ids[..., :3]), good[1]],
        megatron_r3.LayoutMismatchError,
        r"sample 0 .*shape \(8, 3, 3\), expected \[tokens, 3 MoE layers, 4 experts\]",
    ),
    "another number of experts": (
        other_layout(num_experts=32),
        megatron_r3.LayoutMismatchError,
        "num_experts 32 instead of 16",
    ),
    "a missing layer": (
        other_layout(moe_layers=(1, 3)),
        megatron_r3.LayoutMismatchError,
        r"moe_layers \(1, 3\) instead of \(1, 2, 3\)",
    ),
    "a missing layer in the array only": (
        [good[0], unchecked(good[1].ids[:, :2])],
        megatron_r3.LayoutMismatchError,
        r"sample 1 .*shape \(4, 2, 4\), expected \[tokens, 3 MoE layers, 4 experts\]",
    ),
    "another numbering of the layers": (
        other_layout(moe_layers=(0, 1, 2)),
        megatron_r3.LayoutMismatchError,
        r"moe_layers \(0, 1, 2\) instead of \(1, 2, 3\)",
    ),
    "a duplicate": (
        edited(4, 1, [3, 7, 3, 1]),
        megatron_r3.InvalidExpertsError,
        r"sample 0, position 4, layer 2 has experts \[3, 7, 3, 1\], expected 4 distinct ids below",
    ),
    "an id out of range": (
        edited(0, 2, [3, 16, 2, 1]),
        megatron_r3.InvalidExpertsError,
        r"sample 0, position 0, layer 3 has experts \[3, 16, 2, 1\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_routes_are_named_before_the_forward(replay: Any, model: Any, case: str) -> None:
    routes, error, message = WRONG[case]
    assert issubclass(error, megatron_r3.InvalidRoutesError)
    assert issubclass(error, megatron_r3.RoutingReplayError)
    with pytest.raises(error, match=message):
        replay.feed(model, routes, host_lengths=LENGTHS)


def test_a_router_that_sees_other_rows_than_were_fed_is_named(replay: Any, model: Any) -> None:
    [batch] = padded_micro_batches(MIXED[:1])
    replay.feed(model, good, host_lengths=LENGTHS)
    with pytest.raises(
        megatron_r3.RowCountError, match=r"sees 24 rows in micro-batch 0, expected the 18"
    ):
        forward(model, batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither host_lengths nor packed_seq_params"),
        ({"host_lengths": LENGTHS, "seq_length": 8}, "sample 0 has 9 tokens, expected at most"),
    ],
)
def test_lengths_have_to_be_known(
    replay: Any, model: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(megatron_r3.RowCountError, match=message):
        replay.feed(model, good, **arguments)


def test_rows_and_samples_without_routes_are_counted_as_unrecorded(
    controller: Any, model: Any
) -> None:
    [batch] = padded_micro_batches(MIXED[:1])
    with controller.schedule("replay") as schedule:
        controller.feed(model, [good[0][3:], None], host_lengths=LENGTHS, seq_length=batch.width)
        forward(model, batch)
    assert schedule.report.rows.replayed == 5
    assert schedule.report.rows.unrecorded == 3 + 1 + 5
    assert schedule.report.rows.padding == 24 - 14
    explained = schedule.explain(0)
    assert "sample 0: unrecorded 0…2, replayed 3…7, unrecorded 8…8" in explained
    assert "sample 1: unrecorded 0…4" in explained


def assert_followed(
    controller: Any, model: Any, plan: LayoutPlan, cells: Any, feed: dict[str, Any], width: int
) -> None:
    """Run one forward; every router must use the foreign experts of each row's cell."""
    [batch] = padded_micro_batches([(tuple(plan.lengths.tolist()), width)])
    witness = RouterWitness(micro_batch=0).watch(model)
    with controller.schedule("replay") as schedule:
        controller.feed(model, **feed)
        forward(model, batch)
    assert schedule.report.rows.replayed == sum(cell is not None for cell in cells)
    for layer in range(3):
        expected, replayed = expected_map(LAYOUT, cells, layer)
        assert torch.equal(witness.forwards[0, layer][replayed], expected[replayed])


def cells_of(plan: LayoutPlan, samples: Any) -> list[Any]:
    """(sample of the global batch, position) of each row that has a route."""
    return [
        (samples[sample], int(position)) if 0 <= position < plan.lengths[sample] - 1 else None
        for sample, position in zip(plan.sample, plan.position, strict=True)
    ]


@pytest.mark.parametrize("form", ["batch", "list", "bytes", "files"])
def test_a_micro_batch_is_fed_from_the_global_batch(
    controller: Any, model: Any, tmp_path: Any, form: str
) -> None:
    everything = foreign_routes(LAYOUT, (9, 5, 7, 12))
    files = [tmp_path / f"{number}.r3" for number in range(4)]
    for file, routes in zip(files, everything, strict=True):
        file.write_bytes(encode(routes))
    forms = {
        "batch": everything,
        "list": list(everything),
        "bytes": [encode(routes) for routes in everything],
        "files": files,
    }
    plan = LayoutPlan.padded([12, 5], 12)
    feed = {"routes": forms[form], "samples": [3, 1], "host_lengths": [12, 5]}
    assert_followed(controller, model, plan, cells_of(plan, [3, 1]), feed, 12)


def test_a_left_padded_batch_takes_a_plan(controller: Any, model: Any) -> None:
    plan = LayoutPlan.padded(LENGTHS, 12, side="left", shard=controller.shard(model))
    feed = {"routes": good, "plan": plan}
    assert_followed(controller, model, plan, cells_of(plan, range(2)), feed, 12)


def test_a_packer_of_ones_own_takes_identities(controller: Any, model: Any) -> None:
    packed = np.full((2, 12), 7)
    for row, identities in zip(packed, token_identities(LENGTHS), strict=True):
        row[2 : 2 + len(identities)] = identities[::-1]
    plan = LayoutPlan.from_identities(LENGTHS, packed, controller.shard(model))
    assert plan.position[4] == 8
    feed = {"routes": good, "plan": plan}
    assert_followed(controller, model, plan, cells_of(plan, range(2)), feed, 12)


def test_ids_wait_on_the_device_in_their_wire_dtype(replay: Any, model: Any) -> None:
    replay.feed(model, good, host_lengths=LENGTHS)
    [frame] = replay._chunks[0].calls.frames
    assert frame.ids.dtype == torch.uint8
    assert frame.ids.shape == (3, 18, 4)


def test_a_chunk_of_another_model_is_refused(replay: Any, world_of_one: None) -> None:
    [stranger] = tiny_chunks(tiny_config())
    with pytest.raises(megatron_r3.ReplayStateError, match="none of the 1 attached chunks"):
        replay.feed(stranger, good, host_lengths=LENGTHS)


def test_a_wrapped_chunk_is_known_by_what_is_inside(controller: Any, model: Any) -> None:
    from megatron.core.transformer.module import Float16Module

    wrapped = Float16Module(tiny_config(bf16=True, params_dtype=torch.bfloat16), model)
    with controller.schedule("native"):
        controller.feed(wrapped)
