"""In every row of the table each router of each rank uses exactly its rows of the routes."""

import functools
import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.megatron.gloo_pool import GlooPool
from tests.megatron.parallel_faults import rows_that_miss
from tests.megatron.parallel_run import Part, RankReport, Step, run_layout
from tests.megatron.parallel_table import BLOCK, LAYOUTS, Layout, MicroBatches, Model

ROUNDING = 2e-5  # of a tensor's largest value: float32 sums run in another order

every_layout = pytest.mark.parametrize("name", LAYOUTS)


@functools.cache
def reports(name: str) -> list[RankReport]:
    layout = LAYOUTS[name]
    if layout.model.hybrid and not importlib.util.find_spec("megatron.core.models.hybrid"):
        pytest.skip("this megatron-core has no HybridModel")
    return GlooPool(layout.world_size).run(run_layout, layout, **layout.groups)


@functools.cache
def in_one_process(model: Model, micro_batches: MicroBatches) -> Step:
    model = replace(model, hybrid=model.hybrid.replace("|", ""))
    layout = Layout(config={}, model=model, micro_batches=micro_batches, world_size=1)
    [report] = GlooPool(1).run(run_layout, layout)
    return report.foreign


def assert_exact(name: str, ranks: list[RankReport]) -> None:
    """No row of any call is wrong, none is missing, and none is there twice."""
    layout = LAYOUTS[name]
    tokens = sum(length - 1 for lengths, _ in layout.micro_batches for length in lengths)
    rows = tokens * len(layout.model.moe_layer_numbers)
    for kind in ("forward", "recompute", "evaluation"):
        assert sum(getattr(rank, kind).wrong for rank in ranks) == 0, kind
    assert sum(rank.forward.rows for rank in ranks) == rows
    assert sum(rank.evaluation.rows for rank in ranks) == rows
    recomputed = sum(rank.recompute.rows for rank in ranks)
    if layout.config.items() >= BLOCK.items():
        assert 0 < recomputed < rows
    else:
        assert recomputed == (rows if "recompute_granularity" in layout.config else 0)
    assert sum(rank.not_native for rank in ranks) == 0


def assert_same(parts: list[Part], references: list[Part], what: str) -> None:
    """Every rank's part is that part of the reference, and together they are all of it."""
    reference = torch.stack([_whole(part) for part in references]).nansum(0)
    covered = torch.zeros_like(reference, dtype=torch.bool)
    for part in parts:
        covered[part.index] = True
        error = (part.values - reference[part.index]).abs().max() / reference.abs().max()
        assert error < ROUNDING, f"{what}: {error:.1e}"
    assert covered.all(), what


def _whole(part: Part) -> Tensor:
    tensor = torch.full(part.shape, torch.nan)
    tensor[part.index] = part.values
    return tensor


@every_layout
def test_foreign_routes_are_used_in_every_row_of_every_call(name: str) -> None:
    assert_exact(name, reports(name))


@every_layout
def test_no_routes_are_held_behind_the_last_backward(name: str) -> None:
    assert sum(report.foreign.held for report in reports(name)) == 0


@pytest.mark.parametrize(
    "name", [n for n, layout in LAYOUTS.items() if "bf16" not in layout.config]
)
def test_logits_and_gradients_are_those_of_one_process(name: str) -> None:
    layout, ranks = LAYOUTS[name], [report.foreign for report in reports(name)]
    reference = in_one_process(layout.model, layout.micro_batches)
    for call, part in reference.logits.items():
        parts = [rank.logits[call] for rank in ranks if call in rank.logits]
        assert_same(parts, [part], f"logits of {call}")
    for key, parts in reference.gradients.items():
        if layout.expert_gradients or "experts" not in key:
            assert_same([p for rank in ranks for p in rank.gradients.get(key, [])], parts, key)


@every_layout
def test_replay_of_the_own_record_repeats_the_step_bit_for_bit(name: str) -> None:
    assert all(report.own_record_repeats for report in reports(name))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("pp2_vpp2", "one_queue_for_all_chunks"),
        ("pp2", "feed_batch_major"),
        ("dp2 mtp, counts coincide", "shift_layers"),
        ("dp2 mtp, counts coincide", "alias_mtp"),
    ],
)
def test_the_checks_see_what_others_get_wrong(name: str, fault: str) -> None:
    layout = LAYOUTS[name]
    assert sum(GlooPool(layout.world_size).run(rows_that_miss, layout, fault, **layout.groups)) > 0
