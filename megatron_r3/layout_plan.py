"""Which token of which sample stands in each row that a router of this rank sees.

Pure index arithmetic on numpy arrays: nothing here knows torch, Megatron or a process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped

from megatron_r3.errors import RowCountError
from megatron_r3.shard import WHOLE as WHOLE
from megatron_r3.shard import Integers
from megatron_r3.shard import Shard as Shard

NO_ROW = -1
"""Source of a real token that has no row in the routes, such as the last of a sample."""
PADDING = -2
"""Source of a row that is no token of any sample."""
FIRST_IDENTITY = 1 << 30
"""Identities lie above every vocabulary, so that no padding token is one, and fit into int32."""


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
        lengths: Integers,
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
        _, column = shard.rows([width])
        position = column[:, None] - (width - counts if side == "left" else 0)
        real = (position >= 0) & (position < counts)
        sample = np.where(real, np.arange(len(counts)), -1)
        return cls(counts, _narrow(sample), _narrow(np.broadcast_to(position, real.shape)))

    @classmethod
    def packed(
        cls,
        lengths: Integers,
        padded_lengths: Integers | None = None,
        total: int | None = None,
        shard: Shard = WHOLE,
        cp_sequences: Integers | None = None,
    ) -> LayoutPlan:
        """Plan for a packed (THD) batch ``[1, T]``.

        Args:
            lengths: tokens of each sample.
            padded_lengths: rows that each sample takes with its alignment padding, which stands
                behind its tokens, see :func:`aligned_lengths`; by default ``lengths``. Entries
                behind the last sample's are padding.
            total: rows of the whole pack; what lies behind the last sample is padding. By default
                the sum of ``padded_lengths``.
            shard: this rank's share.
            cp_sequences: rows of each sequence that context parallelism cuts; by default each
                sample, as Megatron does it for packs. ``[S] * rows`` where whole rows of the batch
                are cut and flattened then (Megatron's per-sequence balancing).

        Raises:
            RowCountError: a sample longer than its room, or rows that the ranks cannot share.

        """
        counts = _checked_lengths(lengths)
        rooms = counts if padded_lengths is None else _checked_lengths(padded_lengths)
        size = len(counts)
        if len(rooms) < size or bool((rooms[:size] < counts).any()):
            raise RowCountError(
                f"padded_lengths is {rooms.tolist()} for samples of {counts.tolist()} tokens, "
                "expected as much room as tokens or more for each: pass both per sample."
            )
        rows = int(rooms.sum()) if total is None else total
        rooms = rooms[:size]
        tail = rows - int(rooms.sum())
        if tail < 0:
            raise RowCountError(
                f"the pack has {rows} rows, expected at least {int(rooms.sum())}, the sum of "
                "padded_lengths: check the lengths."
            )
        if cp_sequences is None:
            owner, position = shard.rows(rooms, tail)
        else:
            if sum(cp_sequences) != rows:
                raise RowCountError(
                    f"cp_sequences is {list(cp_sequences)}, expected sequences of {rows} rows "
                    "together, the whole pack: name all that context parallelism cuts."
                )
            sequence, offset = shard.rows(cp_sequences)
            row = (np.cumsum(cp_sequences) - cp_sequences)[sequence] + offset
            ends = np.cumsum(rooms)
            owner = np.searchsorted(ends, row, side="right").astype(np.int32)
            position = _narrow(row - np.append(ends - rooms, 0)[owner])
        owner[position >= np.append(counts, 0).astype(np.int32)[owner]] = -1
        return cls(counts, owner, position)

    @classmethod
    def from_map(cls, lengths: Integers, sample: Integers, position: Integers) -> LayoutPlan:
        """Plan from a map of one's own.

        Args:
            lengths: ``[B]`` tokens of each sample.
            sample: ``[T]`` sample of each local row, -1 for padding.
            position: ``[T]`` position of that row's token in its sample.

        Raises:
            RowCountError: a token that no sample has, or one that stands in two rows.

        """
        counts = _checked_lengths(lengths)
        samples, positions = np.asarray(sample), np.asarray(position)
        for name, array in (("sample", samples), ("position", positions)):
            if array.dtype.kind not in "iu" or array.shape != (samples.size,):
                raise RowCountError(
                    f"{name} is an array of shape {array.shape} and dtype {array.dtype}, expected "
                    f"{samples.size} integers: give one for each local row."
                )
        real = samples >= 0
        wrong = samples >= len(counts)
        wrong |= real & ((positions < 0) | (positions >= counts[np.where(wrong, 0, samples)]))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise RowCountError(
                f"row {row} holds position {int(positions[row])} of sample {int(samples[row])}, "
                f"expected tokens of {len(counts)} samples with lengths {counts.tolist()}, or "
                "sample -1 for padding: mend the map."
            )
        plan = cls(counts, _narrow(samples), _narrow(positions))
        index = plan.token_index()[real]
        times = np.bincount(index, minlength=1)
        if times.max() > 1:
            first, second = np.flatnonzero(plan.token_index() == int(times.argmax()))[:2]
            raise RowCountError(
                f"rows {int(first)} and {int(second)} both hold position {int(positions[first])} "
                f"of sample {int(samples[first])}, expected each token once: mend the map."
            )
        return plan

    @classmethod
    def from_identities(cls, lengths: Integers, packed: Any, shard: Shard = WHOLE) -> LayoutPlan:
        """Plan of a batch that the caller's own packer made of :func:`token_identities`.

        Args:
            lengths: tokens of each sample.
            packed: what the packer made of them in place of token ids: ``[B, S]``, or ``[S]`` for
                a pack; a numpy array or a tensor on the CPU. Any other value is padding.
            shard: what the model itself cuts from that, in general sequence parallelism alone.

        Raises:
            RowCountError: values that are no identities of these samples, or a token twice.

        """
        counts = _checked_lengths(lengths)
        values = np.atleast_2d(np.asarray(packed))
        if values.dtype.kind not in "iu" or values.dtype.itemsize < 4 or values.ndim != 2:
            raise RowCountError(
                f"the packed identities have dtype {values.dtype} and shape {values.shape}, "
                "expected int32 or int64 [B, S] or [S]: pack them as token ids are packed."
            )
        _, column = shard.rows([values.shape[1]])
        index = values.T[column].reshape(-1).astype(np.int64) - FIRST_IDENTITY
        if len(index) and int(index.max()) >= counts.sum():
            raise RowCountError(
                f"the packer returned {int(index.max()) + FIRST_IDENTITY}, expected padding below "
                f"{FIRST_IDENTITY} or one of {int(counts.sum())} identities above: pack "
                "token_identities(lengths) of the same lengths, and nothing that changes them."
            )
        ends = np.cumsum(counts)
        sample = np.searchsorted(ends, index, side="right")
        position = index - np.append(ends - counts, 0)[sample]
        return cls.from_map(counts, np.where(index < 0, -1, sample), position)

    def unflattened(self, tokens_per_sample: int) -> LayoutPlan:
        """The rows as MoE layers see them when ``PackedSeqParams.tokens_per_sample`` is set.

        megatron-core then turns ``[mbs * S, 1]`` into ``[S, mbs]`` just before the MoE layer, from
        the rows that are on the rank (``TransformerLayer._maybe_unflatten_for_moe``, since 0.19).

        Raises:
            RowCountError: rows that do not divide into samples of that many tokens.

        """
        samples = self.num_rows // tokens_per_sample
        if samples <= 1:
            return self
        if self.num_rows % tokens_per_sample:
            raise RowCountError(
                f"the rank holds {self.num_rows} rows, expected a multiple of tokens_per_sample "
                f"{tokens_per_sample}: megatron-core cannot divide them into samples either."
            )
        order = np.arange(self.num_rows).reshape(samples, tokens_per_sample).T.reshape(-1)
        return LayoutPlan(self.lengths, self.sample[order], self.position[order])

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
        return np.asarray(np.where(self.is_padding, PADDING, index))

    def source_rows(
        self,
        token_starts: Int64[np.ndarray, " B"],
        row_counts: Int64[np.ndarray, " B"],
        first_rows: Int64[np.ndarray, " B"],
    ) -> Int64[np.ndarray, " T"]:
        """Row of a ragged batch's ``values`` that belongs to each local row.

        Args:
            token_starts: ``[B]`` position of each sample's first row.
            row_counts: ``[B]`` rows of each sample.
            first_rows: ``[B]`` where in ``values`` each sample's rows begin.

        Returns:
            ``[T]`` indices; ``NO_ROW`` where the sample has no row for that token, ``PADDING``
            where there is no token.

        """
        source: Int64[np.ndarray, " T"] = (first_rows - token_starts)[self.sample]
        source += self.position
        stops = (token_starts + row_counts).astype(np.int32)
        source[self.position >= stops[self.sample]] = NO_ROW
        if token_starts.any():
            source[self.position < token_starts[self.sample]] = NO_ROW
        source[self.sample < 0] = PADDING
        return source

    def scatter(self, tokens: Shaped[np.ndarray, "tokens ..."], fill: Any) -> Any:
        """Bring what belongs to each token into the order of the local rows.

        Args:
            tokens: ``[ΣS, ...]`` masks, identities or whatever else, sample after sample.
            fill: what padding rows get.

        Returns:
            ``[T, ...]`` of the same dtype.

        """
        rows = np.full((self.num_rows, *tokens.shape[1:]), fill, tokens.dtype)
        index = self.token_index()
        rows[index >= 0] = tokens[index[index >= 0]]
        return rows

    def gather(self, rows: Shaped[np.ndarray, "T ..."], fill: Any) -> Any:
        """Inverse of :meth:`scatter`; tokens that this rank does not hold get ``fill``."""
        tokens = np.full((int(self.lengths.sum()), *rows.shape[1:]), fill, rows.dtype)
        index = self.token_index()
        tokens[index[index >= 0]] = rows[index >= 0]
        return tokens


def aligned_lengths(
    lengths: Integers, multiple: int, total_multiple: int = 1
) -> Int64[np.ndarray, " B"]:
    """Rows that samples take in a pack when each is padded to a multiple.

    Args:
        lengths: tokens of each sample.
        multiple: of the rows of each sample: ``2 * cp * tp`` under context parallelism, or its
            least common multiple with what FP8 kernels want.
        total_multiple: of the rows of the whole pack; the last sample takes what is missing.

    """
    counts = _checked_lengths(lengths)
    rooms: Int64[np.ndarray, " B"] = -(-counts // multiple) * multiple
    rooms[-1] += -int(rooms.sum()) % total_multiple
    return rooms


def token_identities(lengths: Integers) -> list[Int64[np.ndarray, " length"]]:
    """Stand-ins for the token ids of each sample that tell sample and position.

    Push them through your own packer in place of token ids, and give what comes out to
    :meth:`LayoutPlan.from_identities`.
    """
    counts = _checked_lengths(lengths)
    every = FIRST_IDENTITY + np.arange(int(counts.sum()))
    return np.split(every, np.cumsum(counts)[:-1])


def _checked_lengths(lengths: Integers) -> Int64[np.ndarray, " B"]:
    counts = np.asarray(lengths, np.int64).reshape(-1)
    if not len(counts) or bool((counts < 0).any()):
        raise RowCountError(
            f"lengths is {counts.tolist()}, expected the number of tokens of one sample or more: "
            "pass one entry for each sample."
        )
    return counts


def _narrow(array: np.ndarray[Any, Any]) -> Int32[np.ndarray, " T"]:
    return np.ascontiguousarray(array, np.int32).reshape(-1)
