"""What feed reads from the arguments that a trainer has at hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_r3 import LayoutPlan, RowCountError, Shard
from megatron_r3.micro_batch_plan import micro_batch_plan

WHOLE = Shard()


def packed(real: list[int], padded: list[int] | None = None, device: str = "cpu") -> Any:
    lengths = {"cu_seqlens_q": real, "cu_seqlens_q_padded": padded}
    tensors = {
        name: torch.tensor([0, *value], dtype=torch.int32).cumsum(0).to(device)
        for name, value in lengths.items()
        if value is not None
    }
    return PackedSeqParams(qkv_format="thd", **tensors)


@pytest.mark.parametrize(
    ("params", "arguments"),
    [
        (packed([5, 7], [8, 8]), {}),
        (packed([8, 8]), {"host_lengths": [5, 7]}),
        (packed([5, 7], [8, 8]), {"host_lengths": [5, 7], "seq_length": 16}),
        (packed([5, 7], [8, 8], "meta"), {"host_lengths": [5, 7], "padded_lengths": [8, 8]}),
    ],
    ids=["on_the_host", "padded_only", "with_lengths", "on_a_gpu"],
)
def test_a_pack_is_known_from_its_params_and_lengths(params: Any, arguments: Any) -> None:
    names = ("host_lengths", "padded_lengths", "seq_length")
    plan = micro_batch_plan(params, *(arguments.get(name) for name in names), WHOLE)
    assert plan.same_rows(LayoutPlan.packed([5, 7], [8, 8]))


def test_segments_behind_the_last_sample_are_padding() -> None:
    plan = micro_batch_plan(packed([8, 4, 4]), [8, 3], None, None, WHOLE)
    assert plan.same_rows(LayoutPlan.packed([8, 3], [8, 4], total=16))


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1), (4, 2)])
def test_a_micro_batch_may_bring_its_own_context_parallel_group(size: int, rank: int) -> None:
    params = packed([16])
    params.local_cp_size = size
    if size > 1:
        params.cp_group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    plan = micro_batch_plan(params, [13], None, None, Shard(2, 0, 2, 1))
    assert plan.same_rows(LayoutPlan.packed([13], [16], shard=Shard(size, rank, 2, 1)))


def test_rows_are_unflattened_where_the_params_say_so() -> None:
    params = packed([5, 3, 4, 4])
    params.tokens_per_sample = 8
    plan = micro_batch_plan(params, None, None, None, WHOLE)
    assert plan.sample[:4].tolist() == [0, 2, 0, 2]
    assert plan.same_rows(LayoutPlan.packed([5, 3, 4, 4]).unflattened(8))


def dynamic(size: int, group_size: int | None) -> Any:
    params = packed([16])
    params.local_cp_size = size
    if group_size is not None:
        params.cp_group = SimpleNamespace(size=lambda: group_size, rank=lambda: 0)
    return params


@pytest.mark.parametrize(
    ("params", "lengths", "message"),
    [
        (None, None, "neither host_lengths nor packed_seq_params"),
        (packed([5], device="meta"), None, r"cu_seqlens_q lies on a GPU.*pass host_lengths"),
        (packed([5], [8], "meta"), [5], r"cu_seqlens_q_padded lies on a GPU.*padded_lengths"),
        (dynamic(4, None), [16], "local_cp_size 4 and a cp_group of none"),
        (dynamic(4, 2), [16], "local_cp_size 4 and a cp_group of 2"),
    ],
)
def test_what_is_not_known_on_the_host_is_named(params: Any, lengths: Any, message: str) -> None:
    with pytest.raises(RowCountError, match=message):
        micro_batch_plan(params, lengths, None, None, WHOLE)
