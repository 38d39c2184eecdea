"""The plan against lists of (sample, position) labels that are padded, cut and read row by row."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r3.errors import RowCountError
from megatron_r3.layout_plan import (
    NO_ROW,
    PADDING,
    LayoutPlan,
    Shard,
    aligned_lengths,
    token_identities,
)
from megatron_r3.scatter import scatter

Label = tuple[int, int] | None


@dataclass(frozen=True)
class Batch:
    """A micro-batch in one layout; ``rooms`` are the rows of each sample with its padding.

    ``kind`` is ``left`` or ``right`` padded, ``samples`` (a pack of which context parallelism cuts
    each sample) or ``whole`` (a pack that it cuts as one sequence).
    """

    kind: str
    lengths: list[int]
    rooms: list[int]
    tail: int
    cp_size: int
    sp_size: int
    cp_order: Any

    def shards(self) -> list[Shard]:
        ranks = np.ndindex(self.cp_size, self.sp_size)
        return [Shard(self.cp_size, cp, self.sp_size, sp, self.cp_order) for cp, sp in ranks]

    def plan(self, shard: Shard) -> LayoutPlan:
        if self.kind in ("left", "right"):
            return LayoutPlan.padded(self.lengths, self.rooms[0], self.kind, shard)
        total = sum(self.rooms) + self.tail
        whole = [total] if self.kind == "whole" else None
        return LayoutPlan.packed(self.lengths, self.rooms, total, shard, whole)

    def whole_rows(self) -> list[list[Label]]:
        """What the trainer lays out: the rows of a padded batch, or one pack."""
        rows: list[list[Label]] = []
        for sample, (length, room) in enumerate(zip(self.lengths, self.rooms, strict=True)):
            tokens: list[Label] = [(sample, position) for position in range(length)]
            padding: list[Label] = [None] * (room - length)
            rows.append(padding + tokens if self.kind == "left" else tokens + padding)
        if self.kind in ("left", "right"):
            return rows
        return [[label for row in rows for label in row] + [None] * self.tail]

    def labels(self, shard: Shard) -> list[Label]:
        """(sample, position) of each row of one rank's routers, cut element by element."""
        rows = self.whole_rows()
        if self.kind == "samples":
            edges = [0, *itertools.accumulate(self.rooms)]
            parts = [cut(rows[0][a:b], shard) for a, b in itertools.pairwise(edges)]
            rows = [[label for part in parts for label in part]]
            rows[0] += [None] * (self.tail // self.cp_size)
        else:
            rows = [cut(row, shard) for row in rows]
        columns = list(zip(*rows, strict=True))
        share = len(columns) // shard.sp_size
        mine = columns[shard.sp_rank * share : (shard.sp_rank + 1) * share]
        return [label for column in mine for label in column]


def cut(row: list[Any], shard: Shard) -> list[Any]:
    """What context parallelism leaves one rank of a sequence."""
    if shard.cp_size == 1:
        return row
    if shard.cp_order == "contiguous":
        size = len(row) // shard.cp_size
        return row[shard.cp_rank * size : (shard.cp_rank + 1) * size]
    size = len(row) // (2 * shard.cp_size)
    chunks = [row[i * size : (i + 1) * size] for i in range(2 * shard.cp_size)]
    return chunks[shard.cp_rank] + chunks[-1 - shard.cp_rank]


def labels_of(plan: LayoutPlan) -> list[Label]:
    return [
        (int(sample), int(position)) if sample >= 0 else None
        for sample, position in zip(plan.sample, plan.position, strict=True)
    ]


@st.composite
def batches(draw: Any, kinds: Sequence[str] = ("left", "right", "samples", "whole")) -> Batch:
    kind = draw(st.sampled_from(kinds))
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    cp_size, sp_size = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 4]))
    align = math.lcm(2 * cp_size * sp_size, draw(st.sampled_from([1, 16])))
    rooms = [-(-length // align) * align for length in lengths]
    if kind in ("left", "right"):
        rooms = [max(rooms) + align * draw(st.integers(0, 1))] * len(lengths)
    tail = align * draw(st.integers(0, 2)) if kind in ("samples", "whole") else 0
    order = draw(st.sampled_from(["zigzag", "contiguous"]))
    return Batch(kind, lengths, rooms, tail, cp_size, sp_size, order)


@st.composite
def routed_batches(draw: Any) -> tuple[Batch, np.ndarray, np.ndarray]:
    """A batch, where the rows of each sample start and how many there are."""
    batch = draw(batches())
    starts = [draw(st.integers(0, n)) for n in batch.lengths]
    counts = [draw(st.integers(0, n - s)) for n, s in zip(batch.lengths, starts, strict=True)]
    return batch, np.array(starts), np.array(counts)


@settings(deadline=None, max_examples=150)
@given(routed_batches())
def test_routes_reach_their_rows_on_every_rank_and_come_back(
    routed: tuple[Batch, np.ndarray, np.ndarray],
) -> None:
    batch, starts, counts = routed
    where: dict[Label, int] = {}
    for sample, (start, count) in enumerate(zip(starts, counts, strict=True)):
        where |= {(sample, p): len(where) + i for i, p in enumerate(range(start, start + count))}
    # Each id tells its sample and position, its layer and its slot.
    values = np.arange(len(where) * 3 * 2, dtype=np.uint16).reshape(len(where), 3, 2)
    back = np.full((sum(batch.lengths), 2, 2), 9999, np.uint16)
    for shard in batch.shards():
        plan, labels = batch.plan(shard), batch.labels(shard)
        assert labels_of(plan) == labels
        source = plan.source_rows(starts, counts, np.cumsum(counts) - counts)
        missing = [PADDING if label is None else NO_ROW for label in labels]
        expected = [where.get(label, none) for label, none in zip(labels, missing, strict=True)]
        assert source.tolist() == expected
        local = np.zeros((2, plan.num_rows, 2), np.uint16)
        scatter(values, source, [2, 0], 9999, local)
        for row, value in enumerate(expected):
            ids = values[value][[2, 0]] if value >= 0 else np.full((2, 2), 9999)
            assert np.array_equal(local[:, row], ids)
        part = plan.gather(local.swapaxes(0, 1), 9999)
        assert ((back == 9999) | (part == 9999)).all(), "a token on two ranks"
        back = np.minimum(back, part)
    tokens = np.full_like(back, 9999)
    for label, value in where.items():
        assert label is not None
        tokens[sum(batch.lengths[: label[0]]) + label[1]] = values[value][[2, 0]]
    assert np.array_equal(back, tokens)


@settings(deadline=None)
@given(batches(), st.sampled_from([np.int32, np.int64]), st.integers(-1, 200_000))
def test_a_packer_of_ones_own_is_followed_by_its_identities(
    batch: Batch, dtype: Any, pad_token: int
) -> None:
    identities = [sample.astype(dtype).tolist() for sample in token_identities(batch.lengths)]
    rows = [
        [pad_token if label is None else identities[label[0]][label[1]] for label in row]
        for row in batch.whole_rows()
    ]
    if batch.kind == "samples":
        batch = replace(batch, cp_size=1)  # cut by the packer, or not at all
    for shard in batch.shards():
        packed = np.array([cut(row, shard) for row in rows], dtype)
        sequence_parallel = Shard(sp_size=shard.sp_size, sp_rank=shard.sp_rank)
        plan = LayoutPlan.from_identities(batch.lengths, packed, sequence_parallel)
        assert labels_of(plan) == batch.labels(shard)


@given(batches())
def test_masks_and_identities_go_the_same_way(batch: Batch) -> None:
    tokens = np.arange(sum(batch.lengths))
    back = np.full_like(tokens, -1)
    for shard in batch.shards():
        plan = batch.plan(shard)
        local = plan.scatter(tokens, -1)
        starts = np.cumsum(batch.lengths) - batch.lengths
        expected = [-1 if x is None else starts[x[0]] + x[1] for x in batch.labels(shard)]
        assert local.tolist() == expected
        back = np.maximum(back, plan.gather(local, -1))
    assert np.array_equal(back, tokens)


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=6),
    st.sampled_from([1, 4, 16, 48]),
    st.sampled_from([1, 128]),
)
def test_aligned_lengths_are_the_smallest_multiples(
    lengths: list[int], multiple: int, total_multiple: int
) -> None:
    rooms = aligned_lengths(lengths, multiple, total_multiple).tolist()
    smallest = [next(n for n in range(10_000) if n >= x and n % multiple == 0) for x in lengths]
    assert rooms[:-1] == smallest[:-1]
    assert sum(rooms) % total_multiple == 0
    assert 0 <= rooms[-1] - smallest[-1] < total_multiple


@pytest.mark.parametrize(("cp_size", "cp_rank"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 2), (4, 3)])
def test_context_parallel_rows_are_where_megatron_has_their_positions(
    world_of_one: None, cp_size: int, cp_rank: int
) -> None:
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    group: Any = SimpleNamespace(size=lambda: cp_size, rank=lambda: cp_rank)
    positions = torch.arange(48)
    if cp_size > 1:
        positions = get_pos_emb_on_this_cp_rank(positions, 0, group)
    plan = LayoutPlan.padded([48], shard=Shard(cp_size, cp_rank))
    assert plan.position.tolist() == positions.tolist()


@pytest.mark.parametrize(("cp_size", "cp_rank"), [(1, 0), (2, 1), (3, 0), (4, 2)])
def test_context_parallel_packs_are_cut_as_megatron_says(cp_size: int, cp_rank: int) -> None:
    dsa_layout = pytest.importorskip(
        "megatron.core.transformer.experimental_attention_variant.dsa_layout",
        reason="this megatron-core cuts packs in Transformer Engine alone",
    )
    rooms = [24, 72, 48]
    rows = dsa_layout.build_packed_allgather_cp_local_positions(
        torch.tensor([0, *itertools.accumulate(rooms)]), cp_size, cp_rank, torch.device("cpu")
    )
    plan = LayoutPlan.packed(rooms, shard=Shard(cp_size, cp_rank))
    assert plan.token_index().tolist() == rows.tolist()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_rows_are_unflattened_as_megatron_does_before_a_moe_layer(samples: int) -> None:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    if not hasattr(TransformerLayer, "_maybe_unflatten_for_moe"):
        pytest.skip("this megatron-core knows no tokens_per_sample")
    plan = LayoutPlan.packed([5, 3, 4, 4, 2, 6][: 2 * samples])
    layer: Any = SimpleNamespace(is_moe_layer=True)
    params: Any = SimpleNamespace(tokens_per_sample=8)
    hidden, _, _ = TransformerLayer._maybe_unflatten_for_moe(
        layer, torch.from_numpy(plan.token_index())[:, None, None], None, params
    )
    assert plan.unflattened(8).token_index().tolist() == hidden.flatten().tolist()


RIGHT = ([2, 1], [0, 0, 1], [0, 1, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayoutPlan.padded([3, 9], 8), r"sample 1 has 9 tokens.*at most seq_length 8"),
        (lambda: LayoutPlan.padded([], 8), r"lengths is \[\]"),
        (lambda: LayoutPlan.padded([3, -1]), r"lengths is \[3, -1\]"),
        (lambda: LayoutPlan.packed([3, 9], [4, 8]), r"padded_lengths is \[4, 8\]"),
        (lambda: LayoutPlan.packed([3, 9], [4]), r"padded_lengths is \[4\]"),
        (lambda: LayoutPlan.packed([3, 9], total=11), r"the pack has 11 rows.*at least 12"),
        (lambda: LayoutPlan.packed([8], cp_sequences=[4]), r"is \[4\], expected .* of 8 rows"),
        (lambda: LayoutPlan.padded([6], 6, shard=Shard(2, 0)), r"take \[6\] rows.*multiples of 4"),
        (lambda: LayoutPlan.packed([4], total=7, shard=Shard(2, 0)), r"\[4\] rows and 3 behind"),
        (lambda: LayoutPlan.padded([7], 7, shard=Shard(1, 0, 2)), r"7 columns.*multiple of 2"),
        (lambda: LayoutPlan.packed([5]).unflattened(2), r"holds 5 rows.*tokens_per_sample 2"),
        (lambda: Shard(2, 2), r"cp_rank is 2 of cp_size 2"),
        (lambda: Shard(sp_size=4, sp_rank=-1), r"sp_rank is -1 of sp_size 4"),
        (lambda: Shard(cp_order="striped"), r"cp_order is 'striped'"),  # type: ignore[arg-type]
        (lambda: LayoutPlan.from_map([2, 1], [0, 0, 2], [0, 1, 0]), r"row 2 holds .* sample 2"),
        (lambda: LayoutPlan.from_map([2, 1], [0, 1, 1], [0, 0, 1]), r"row 2 holds position 1"),
        (lambda: LayoutPlan.from_map([2, 1], [0, -1, 0], [1, 0, 1]), r"rows 0 and 2 both hold"),
        (lambda: LayoutPlan.from_map([2], [0], [[1]]), r"position .* shape \(1, 1\)"),
        (lambda: LayoutPlan.from_map([2], [0.0], [1]), r"sample .* dtype float64"),  # type: ignore[list-item]
        (lambda: LayoutPlan.from_identities([2], [0.5]), r"dtype float64 and shape \(1, 1\)"),
        (lambda: LayoutPlan.from_identities([2], token_identities([3])[0]), r"returned 1073741826"),
        (lambda: LayoutPlan.from_identities([2], [2**30, 2**30]), r"rows 0 and 1 both hold"),
    ],
)
def test_a_layout_that_cannot_be_is_named(make: Any, message: str) -> None:
    with pytest.raises(RowCountError, match=message):
        make()
