"""Which token of which sample stands in each row that a router of this rank sees.

Pure index arithmetic on numpy arrays: nothing here knows torch, Megatron or a process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt

from megatron_r3.errors import RowCountError

NO_ROW = -1
"""Source of a real token that has no row in the routes, such as the last of a sample."""
PADDING = -2
"""Source of a row that is no token of any sample."""


@dataclass(frozen=True)
class Shard:
    """The part of the token axis that one rank holds.

    Attributes:
        cp_size: context-parallel ranks; each holds chunks ``r`` and ``2 * cp_size - 1 - r`` of
            every sequence (the zigzag of Megatron's ``get_batch_on_this_cp_rank``).
        cp_rank: this rank among them.
        sp_size: tensor-parallel ranks that split the token axis (sequence parallelism), else 1.
        sp_rank: this rank among them.

    """

    cp_size: int = 1
    cp_rank: int = 0
    sp_size: int = 1
    sp_rank: int = 0


WHOLE = Shard()


@dataclass(frozen=True, eq=False)
class LayoutPlan:
    """Maps the rows of a router's logits, in their order, to tokens of a micro-batch.

    Attributes:
        lengths: ``[B]`` tokens of each sample.
        sample: ``[T]`` sample of each local row, -1 for padding.
        position: ``[T]`` position of that row's token in its sample; undefined for padding.

    """

    lengths: Int64[np.ndarray, " B"]
    sample: Int32[np.ndarray, " T"]
    position: Int32[np.ndarray, " T"]

    @classmethod
    def padded(
        cls,
        lengths: Sequence[int],
        seq_length: int | None = None,
        side: Literal["right", "left"] = "right",
        shard: Shard = WHOLE,
    ) -> LayoutPlan:
        """Plan for a padded batch ``[B, S]``, whose router rows run sequence first: ``s * B + b``.

        Args:
            lengths: tokens of each sample.
            seq_length: S, with padding; by default the longest sample.
            side: where the padding stands.
            shard: this rank's share.

        Raises:
            RowCountError: a sample longer than S, or an S that the ranks cannot share evenly.

        """
        counts = _checked_lengths(lengths)
        width = int(counts.max()) if seq_length is None else seq_length
        if int(counts.max()) > width:
            raise RowCountError(
                f"sample {int(counts.argmax())} has {int(counts.max())} tokens, expected at most "
                f"seq_length {width}: pass the padded length of the batch."
            )
        columns = _shard_columns(np.array([width]), shard)
        position = columns[:, None] - (width - counts if side == "left" else 0)
        real = (position >= 0) & (position < counts)
        sample = np.where(real, np.arange(len(counts)), -1)
        return cls(counts, _narrow(sample), _narrow(np.broadcast_to(position, real.shape)))

    @classmethod
    def packed(
        cls,
        lengths: Sequence[int],
        padded_lengths: Sequence[int] | None = None,
        total: int | None = None,
        shard: Shard = WHOLE,
    ) -> LayoutPlan:
        """Plan for a packed (THD) batch ``[1, T]``.

        Args:
            lengths: tokens of each sample.
            padded_lengths: rows that each sample takes with its alignment padding, which stands
                behind its tokens; by default ``lengths``.
            total: rows of the whole pack; what lies behind the last sample is padding. By default
                the sum of ``padded_lengths``.
            shard: this rank's share.

        Raises:
            RowCountError: a sample longer than its room, or rows that the ranks cannot share.

        """
        counts = _checked_lengths(lengths)
        rooms = counts if padded_lengths is None else _checked_lengths(padded_lengths)
        if len(rooms) != len(counts) or bool((rooms < counts).any()):
            raise RowCountError(
                f"padded_lengths is {rooms.tolist()} for samples of {counts.tolist()} tokens, "
                "expected as much room as tokens or more for each: pass both per sample."
            )
        tail = 0 if total is None else total - int(rooms.sum())
        if tail < 0:
            raise RowCountError(
                f"the pack has {total} rows, expected at least {int(rooms.sum())}, the sum of "
                "padded_lengths: check the lengths."
            )
        rooms = np.append(rooms, tail)
        row = _shard_columns(rooms, shard)
        starts = np.cumsum(rooms) - rooms
        owner = np.searchsorted(starts, row, side="right") - 1
        position = row - starts[owner]
        sample = np.where(position < np.append(counts, 0)[owner], owner, -1)
        return cls(counts, _narrow(sample), _narrow(position))

    @property
    def num_rows(self) -> int:
        """T, the rows that each router of this rank sees."""
        return len(self.sample)

    @property
    def is_padding(self) -> Bool[np.ndarray, " T"]:
        """True for each row that is no token of any sample."""
        return np.asarray(self.sample < 0)

    def same_rows(self, other: LayoutPlan) -> bool:
        """Whether every row holds the same position of the same sample, and samples are as long."""
        return np.array_equal(self.lengths, other.lengths) and np.array_equal(
            self.token_index(), other.token_index()
        )

    def token_index(self) -> Int64[np.ndarray, " T"]:
        """Index of each local row's token when all samples stand one after the other.

        Padding rows get ``PADDING``.
        """
        starts = np.cumsum(self.lengths) - self.lengths
        index = starts[self.sample] + self.position
        return np.where(self.is_padding, PADDING, index)

    def source_rows(
        self, token_starts: Int64[np.ndarray, " B"], row_counts: Int64[np.ndarray, " B"]
    ) -> Int64[np.ndarray, " T"]:
        """Row of a ragged batch's ``values`` that belongs to each local row.

        Args:
            token_starts: ``[B]`` position of each sample's first row.
            row_counts: ``[B]`` rows of each sample.

        Returns:
            ``[T]`` indices; ``NO_ROW`` where the sample has no row for that token, ``PADDING``
            where there is no token.

        """
        offset = self.position - token_starts[self.sample]
        known = (offset >= 0) & (offset < row_counts[self.sample])
        first = np.cumsum(row_counts) - row_counts
        source = np.where(known, first[self.sample] + offset, NO_ROW)
        return np.where(self.is_padding, PADDING, source)

    def gather(self, local: UInt[np.ndarray, "L T k"], fill: int) -> UInt[np.ndarray, "tokens L k"]:
        """Inverse of :func:`scatter`: local rows back in the order of the samples' tokens.

        Tokens that this rank does not hold get ``fill``.
        """
        index = self.token_index()
        held = np.flatnonzero(index >= 0)
        shape = (int(self.lengths.sum()), local.shape[0], local.shape[2])
        tokens = np.full(shape, fill, local.dtype)
        tokens[index[held]] = local[:, held].swapaxes(0, 1)
        return tokens


def scatter(
    values: UInt[np.ndarray, "rows L k"],
    source: Int64[np.ndarray, " T"],
    layers: Sequence[int],
    fill: int,
) -> UInt[np.ndarray, "L_local T k"]:
    """Bring the rows ``source`` of the layers ``layers`` into a router's order.

    One index-select over whole rows of k ids; rows without a source hold ``fill``.
    """
    k = values.shape[2]
    out = np.full((len(layers), len(source), k), fill, values.dtype)
    held = np.flatnonzero(source >= 0)
    if held.size:
        whole_rows = np.ascontiguousarray(values).view(np.dtype((np.void, k * values.itemsize)))
        chosen = whole_rows[..., 0][source[held][None, :], np.asarray(layers)[:, None]]
        out.view(whole_rows.dtype)[..., 0][:, held] = chosen
    return out


def _checked_lengths(lengths: Sequence[int]) -> Int64[np.ndarray, " B"]:
    counts = np.asarray(lengths, np.int64).reshape(-1)
    if not len(counts) or bool((counts < 0).any()):
        raise RowCountError(
            f"lengths is {counts.tolist()}, expected the number of tokens of one sample or more: "
            "pass one entry for each sample."
        )
    return counts


def _shard_columns(rooms: Int64[np.ndarray, " n"], shard: Shard) -> Int64[np.ndarray, " local"]:
    """Global columns of the token axis that this rank holds, sequences of ``rooms`` columns."""
    parts = 2 * shard.cp_size
    if shard.cp_size > 1 and bool((rooms % parts).any()):
        raise RowCountError(
            f"sequences take {rooms.tolist()} rows, expected multiples of {parts}, twice the "
            f"context-parallel size {shard.cp_size}: pad each sequence."
        )
    columns = np.arange(int(rooms.sum()))
    if shard.cp_size > 1:
        starts = np.cumsum(rooms) - rooms
        chunk = (columns - np.repeat(starts, rooms)) // np.repeat(
            np.maximum(rooms // parts, 1), rooms
        )
        columns = columns[(chunk == shard.cp_rank) | (chunk == parts - 1 - shard.cp_rank)]
    if len(columns) % shard.sp_size:
        raise RowCountError(
            f"the token axis has {len(columns)} columns, expected a multiple of {shard.sp_size}, "
            "the ranks of sequence parallelism: pad the batch."
        )
    share = len(columns) // shard.sp_size
    return columns[shard.sp_rank * share : (shard.sp_rank + 1) * share]


def _narrow(array: np.ndarray[Any, Any]) -> Int32[np.ndarray, " T"]:
    return np.ascontiguousarray(array, np.int32).reshape(-1)
