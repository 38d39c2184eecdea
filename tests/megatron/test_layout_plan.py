"""The plan against lists of (sample, position) labels that are padded, cut and read row by row."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r3.errors import RowCountError
from megatron_r3.layout_plan import NO_ROW, PADDING, LayoutPlan, Shard, scatter

Label = tuple[int, int] | None


@st.composite
def shards(draw: Any) -> Shard:
    cp_size, sp_size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    return Shard(
        cp_size,
        draw(st.integers(0, cp_size - 1)),
        sp_size,
        draw(st.integers(0, sp_size - 1)),
    )


def zigzag(row: list[Any], shard: Shard) -> list[Any]:
    """The two chunks of one sequence that a context-parallel rank holds."""
    size = len(row) // (2 * shard.cp_size)
    chunks = [row[i * size : (i + 1) * size] for i in range(2 * shard.cp_size)]
    return chunks[shard.cp_rank] + chunks[-1 - shard.cp_rank] if shard.cp_size > 1 else row


def share(rows: list[Any], shard: Shard) -> list[Any]:
    size = len(rows) // shard.sp_size
    return rows[shard.sp_rank * size : (shard.sp_rank + 1) * size]


def padded_labels(lengths: list[int], width: int, side: str, shard: Shard) -> list[Label]:
    grid = []
    for sample, length in enumerate(lengths):
        tokens: list[Label] = [(sample, position) for position in range(length)]
        padding: list[Label] = [None] * (width - length)
        grid.append(zigzag(tokens + padding if side == "right" else padding + tokens, shard))
    return [label for column in share(list(zip(*grid, strict=True)), shard) for label in column]


def packed_labels(lengths: list[int], rooms: list[int], shard: Shard) -> list[Label]:
    pack: list[Label] = []
    for sample, (length, room) in enumerate(zip(lengths, rooms, strict=True)):
        pack += zigzag([(sample, p) for p in range(length)] + [None] * (room - length), shard)
    return share(pack, shard)


def labels_of(plan: LayoutPlan) -> list[Label]:
    return [
        (int(sample), int(position)) if sample >= 0 else None
        for sample, position in zip(plan.sample, plan.position, strict=True)
    ]


LENGTHS = st.lists(st.integers(0, 13), min_size=1, max_size=5)


@given(LENGTHS, st.integers(0, 2), st.sampled_from(["left", "right"]), shards())
def test_a_padded_batch_is_read_sequence_first(
    lengths: list[int], extra: int, side: Any, shard: Shard
) -> None:
    step = 2 * shard.cp_size * shard.sp_size
    width = (-(-max(lengths) // step) + extra) * step
    plan = LayoutPlan.padded(lengths, width, side, shard)
    assert labels_of(plan) == padded_labels(lengths, width, side, shard)


@given(LENGTHS, st.lists(st.integers(0, 2), min_size=5, max_size=5), shards())
def test_a_pack_is_read_sample_by_sample(
    lengths: list[int], extra: list[int], shard: Shard
) -> None:
    step = 2 * shard.cp_size * shard.sp_size
    rooms = [(-(-n // step) + more) * step for n, more in zip(lengths, extra, strict=False)]
    plan = LayoutPlan.packed(lengths, rooms, shard=shard)
    assert labels_of(plan) == packed_labels(lengths, rooms, shard)


@given(LENGTHS, st.integers(0, 5))
def test_rows_behind_the_last_sample_of_a_pack_are_padding(lengths: list[int], tail: int) -> None:
    plan = LayoutPlan.packed(lengths, total=sum(lengths) + tail)
    assert labels_of(plan) == packed_labels([*lengths, 0], [*lengths, tail], Shard())


@st.composite
def routes(draw: Any) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Lengths of samples, where their rows start and how many there are."""
    lengths = draw(LENGTHS)
    starts = [draw(st.integers(0, n)) for n in lengths]
    counts = [draw(st.integers(0, n - start)) for n, start in zip(lengths, starts, strict=True)]
    return lengths, np.array(starts), np.array(counts)


@given(routes(), st.booleans())
def test_scatter_brings_every_row_to_its_token(
    samples: tuple[list[int], np.ndarray, np.ndarray], packed: bool
) -> None:
    lengths, starts, counts = samples
    plan = LayoutPlan.packed(lengths) if packed else LayoutPlan.padded(lengths)
    # Each id tells its sample, its position and its slot.
    where = {}
    for sample, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for position in range(start, start + count):
            where[sample, position] = len(where)
    values = np.arange(len(where) * 3 * 2, dtype=np.uint16).reshape(len(where), 3, 2)
    source = plan.source_rows(starts, counts)
    local = scatter(values, source, layers=[2, 0], fill=9999)
    assert local.shape == (2, plan.num_rows, 2)
    for row, label in enumerate(labels_of(plan)):
        if label in where:
            assert source[row] == where[label]
            assert np.array_equal(local[:, row], values[where[label]][[2, 0]])
        else:
            assert source[row] == (PADDING if label is None else NO_ROW)
            assert (local[:, row] == 9999).all()


@given(LENGTHS, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.booleans())
def test_the_ranks_gather_all_tokens_back(
    lengths: list[int], cp_size: int, sp_size: int, packed: bool
) -> None:
    step = 2 * cp_size * sp_size
    rooms = [-(-n // step) * step for n in lengths]
    tokens = np.arange(sum(lengths) * 3 * 2, dtype=np.uint16).reshape(-1, 3, 2)
    gathered = np.full_like(tokens, 9999)
    for cp_rank, sp_rank in np.ndindex(cp_size, sp_size):
        shard = Shard(cp_size, cp_rank, sp_size, sp_rank)
        plan = (
            LayoutPlan.packed(lengths, rooms, shard=shard)
            if packed
            else LayoutPlan.padded(lengths, max(rooms), shard=shard)
        )
        source = plan.source_rows(np.zeros(len(lengths), np.int64), np.array(lengths))
        part = plan.gather(scatter(tokens, source, [0, 1, 2], 9999), 9999)
        assert ((gathered == 9999) | (part == 9999)).all()
        gathered = np.minimum(gathered, part)
    assert np.array_equal(gathered, tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayoutPlan.padded([3, 9], 8), r"sample 1 has 9 tokens.*at most seq_length 8"),
        (lambda: LayoutPlan.padded([], 8), r"lengths is \[\]"),
        (lambda: LayoutPlan.padded([3, -1]), r"lengths is \[3, -1\]"),
        (lambda: LayoutPlan.packed([3, 9], [4, 8]), r"padded_lengths is \[4, 8\]"),
        (lambda: LayoutPlan.packed([3, 9], [4]), r"padded_lengths is \[4\]"),
        (lambda: LayoutPlan.packed([3, 9], total=11), r"the pack has 11 rows.*at least 12"),
        (lambda: LayoutPlan.padded([6], 6, shard=Shard(2, 0)), r"take \[6\] rows.*multiples of 4"),
        (lambda: LayoutPlan.padded([7], 7, shard=Shard(1, 0, 2)), r"7 columns.*multiple of 2"),
    ],
)
def test_lengths_that_do_not_fit_are_named(make: Any, message: str) -> None:
    with pytest.raises(RowCountError, match=message):
        make()
