"""From the batch that a router sees back to the rows of the rank's own step."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_r3_plugin.row_layout import own_rows

PADDING = -1


class Ranks(NamedTuple):
    """Padded sizes of all data-parallel ranks' steps, and how many of them hold tokens."""

    padded: list[int]
    tokens: list[int]
    tp_size: int

    def step(self, rank: int) -> np.ndarray:
        """The rows of a rank's step, each named by rank and position."""
        rows = 1000 * rank + np.arange(self.padded[rank])
        return np.where(np.arange(self.padded[rank]) < self.tokens[rank], rows, PADDING)

    def shards(self, rank: int) -> np.ndarray:
        """The rank's step in equal parts `[TP, n]`, the last ones padded."""
        step = self.step(rank)
        size = -(-len(step) // self.tp_size)
        filled = np.full(size * self.tp_size, PADDING)
        filled[: len(step)] = step
        return filled.reshape(self.tp_size, size)


@st.composite
def all_ranks(draw: st.DrawFn, max_dp_size: int = 4) -> Ranks:
    tokens = draw(st.lists(st.integers(0, 40), min_size=1, max_size=max_dp_size))
    uniform = draw(st.booleans())
    padded = [max(tokens) if uniform else n + draw(st.integers(0, 3)) for n in tokens]
    return Ranks(padded, tokens, draw(st.sampled_from([1, 2, 3, 4, 8])))


def local(ranks: Ranks, rank: int) -> tuple[np.ndarray, None]:
    return ranks.step(rank), None


def concatenated(ranks: Ranks, rank: int) -> tuple[np.ndarray, None]:
    return np.concatenate([ranks.step(r) for r in range(len(ranks.padded))]), None


def shard(ranks: Ranks, rank: int) -> tuple[np.ndarray, list[int]]:
    return ranks.shards(rank)[0], _shard_sizes(ranks)


def gathered_shards(ranks: Ranks, rank: int) -> tuple[np.ndarray, list[int]]:
    every = [ranks.shards(r).ravel() for r in range(len(ranks.padded))]
    return np.concatenate(every), _shard_sizes(ranks)


def _shard_sizes(ranks: Ranks) -> list[int]:
    return [len(part) for r in range(len(ranks.padded)) for part in ranks.shards(r)]


LAYOUTS: list[Callable[[Ranks, int], tuple[np.ndarray, list[int] | None]]] = [
    local,
    concatenated,
    shard,
    gathered_shards,
]


@pytest.mark.parametrize("layout", LAYOUTS)
@given(ranks=all_ranks())
def test_every_rank_finds_its_own_rows_in_order(layout, ranks: Ranks) -> None:
    for rank, (num_padded, num_tokens) in enumerate(zip(ranks.padded, ranks.tokens, strict=True)):
        batch, shards = layout(ranks, rank)
        rows = own_rows(len(batch), ranks.padded, rank, ranks.tp_size, shards)
        assert rows is not None
        if rows.gathered:
            batch = ranks.shards(rank).ravel()
        found = batch[rows.start : rows.stop]
        assert len(found) == num_padded
        assert (found[:num_tokens] == ranks.step(rank)[:num_tokens]).all()


@given(ranks=all_ranks(max_dp_size=1))
def test_padded_shards_without_data_parallelism_are_cut_to_the_step(ranks: Ranks) -> None:
    batch = ranks.shards(0).ravel()
    rows = own_rows(len(batch), ranks.padded, 0, ranks.tp_size)
    assert rows is not None
    assert (batch[rows.start : rows.stop] == ranks.step(0)).all()


@given(ranks=all_ranks(), num_rows=st.integers(0, 400))
def test_a_batch_of_another_size_has_no_layout(ranks: Ranks, num_rows: int) -> None:
    for rank in range(len(ranks.padded)):
        known = {len(layout(ranks, rank)[0]) for layout in LAYOUTS}
        found = own_rows(num_rows, ranks.padded, rank, ranks.tp_size, _shard_sizes(ranks))
        assert (found is None) == (num_rows not in known)
