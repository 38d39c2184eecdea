"""Routed experts of many sequences in one ragged array, the form in which trainers hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt, UInt8

from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import (
    MAX_POSITION,
    RoutedExperts,
    RowStatus,
    Span,
    check_ids_array,
    check_status,
    checked_ids,
    checked_spans,
)


@dataclass(frozen=True, eq=False)
class RoutedExpertsBatch:
    """Routed experts of B sequences.

    Attributes:
        values: ``[ΣT, L, k]`` ids of all sequences, one after the other, as in
            :class:`RoutedExperts`.
        offsets: ``[B + 1]`` int64; sequence ``b`` owns rows ``offsets[b]:offsets[b + 1]``.
        layout: the model's layout.
        status: ``[ΣT]`` uint8 :class:`RowStatus`; ``None`` means all recorded.
        token_starts: ``[B]`` int64, position of each sequence's first row; ``None`` means 0.
        spans: for each sequence its spans; empty means one rollout span each.

    Raises:
        RoutingSchemaError: the data breaks a rule; the message names the first offence.

    """

    values: UInt[np.ndarray, "rows L k"]
    offsets: Int64[np.ndarray, " B+1"]
    layout: RoutingLayout
    status: UInt8[np.ndarray, " rows"] | None = None
    token_starts: Int64[np.ndarray, " B"] | None = None
    spans: tuple[tuple[Span, ...], ...] = ()

    def __post_init__(self) -> None:
        values = check_ids_array(self.values, self.layout)
        offsets = _check_offsets(self.offsets, len(values))
        size = len(offsets) - 1
        starts = _check_starts(self.token_starts, size)
        status = check_status(self.status, len(values))
        lengths = np.diff(offsets)
        positions = np.arange(len(values)) + np.repeat(starts - offsets[:-1], lengths)
        values = checked_ids(values, self.layout, status, positions)
        given = self.spans or ((),) * size
        if len(given) != size:
            raise RoutingSchemaError(
                f"spans has {len(given)} entries, expected one for each of {size} sequences: "
                "pass an empty tuple for an unknown origin."
            )
        spans = tuple(
            checked_spans(s, int(start), int(start + length))
            for s, start, length in zip(given, starts, lengths, strict=True)
        )
        for name, value in (
            ("values", values),
            ("offsets", offsets),
            ("status", status),
            ("token_starts", starts),
            ("spans", spans),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def trusted(
        cls,
        values: UInt[np.ndarray, "rows L k"],
        offsets: Int64[np.ndarray, " B+1"],
        layout: RoutingLayout,
        status: UInt8[np.ndarray, " rows"],
        token_starts: Int64[np.ndarray, " B"],
        spans: tuple[tuple[Span, ...], ...],
    ) -> RoutedExpertsBatch:
        """Build from parts that are already valid, without looking at them again."""
        self = object.__new__(cls)
        for name, value in (
            ("values", values),
            ("offsets", offsets),
            ("layout", layout),
            ("status", status),
            ("token_starts", token_starts),
            ("spans", spans),
        ):
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def from_list(cls, samples: Sequence[RoutedExperts]) -> RoutedExpertsBatch:
        """Copy the rows of ``samples`` into one array.

        Raises:
            RoutingSchemaError: no samples, or samples of different models.

        """
        if not samples:
            raise RoutingSchemaError("no samples, expected at least one: a batch needs a layout.")
        layout = samples[0].layout
        for index, sample in enumerate(samples):
            layout.require_same(sample.layout, f"sample {index}")
        offsets = np.zeros(len(samples) + 1, np.int64)
        np.cumsum([len(s) for s in samples], out=offsets[1:])
        return cls.trusted(
            np.concatenate([s.ids for s in samples]),
            offsets,
            layout,
            np.concatenate([s._status for s in samples]),
            np.array([s.token_start for s in samples], np.int64),
            tuple(s.spans for s in samples),
        )

    @classmethod
    def concat(cls, batches: Sequence[RoutedExpertsBatch]) -> RoutedExpertsBatch:
        """Put batches one after the other."""
        if not batches:
            raise RoutingSchemaError("no batches, expected at least one: a batch needs a layout.")
        layout = batches[0].layout
        for index, batch in enumerate(batches):
            layout.require_same(batch.layout, f"batch {index}")
        lengths = np.concatenate([b.lengths for b in batches])
        return cls.trusted(
            np.concatenate([b.values for b in batches]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            layout,
            np.concatenate([b._status for b in batches]),
            np.concatenate([b._starts for b in batches]),
            tuple(s for b in batches for s in b.spans),
        )

    @property
    def lengths(self) -> Int64[np.ndarray, " B"]:
        """Rows of each sequence."""
        return np.diff(self.offsets)

    @property
    def recorded(self) -> Bool[np.ndarray, " rows"]:
        """True for each row whose ids are known."""
        return np.asarray(self._status == RowStatus.RECORDED)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> RoutedExperts:
        """Sequence ``index``, without a copy."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of a batch of {len(self)}")
        index %= len(self)
        first, last = int(self.offsets[index]), int(self.offsets[index + 1])
        return RoutedExperts.trusted(
            self.values[first:last],
            self.layout,
            int(self._starts[index]),
            self._status[first:last],
            self.spans[index],
        )

    def __iter__(self) -> Iterator[RoutedExperts]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> RoutedExpertsBatch:
        """The sequences ``indices`` in that order; an index may repeat.

        Consecutive ascending indices share memory with this batch, others are copied once.
        """
        chosen = np.asarray(indices, np.int64).reshape(-1)
        if len(chosen) and not -len(self) <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise IndexError(
                f"sequences {int(chosen.min())} … {int(chosen.max())} of a batch of {len(self)}"
            )
        chosen = chosen % max(len(self), 1)
        lengths = self.lengths[chosen]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        rows: Any
        if len(chosen) and bool((np.diff(chosen) == 1).all()):
            rows = slice(int(self.offsets[chosen[0]]), int(self.offsets[chosen[-1] + 1]))
        else:
            rows = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], lengths)
        return RoutedExpertsBatch.trusted(
            self.values[rows],
            offsets,
            self.layout,
            self._status[rows],
            self._starts[chosen],
            tuple(self.spans[i] for i in chosen),
        )

    def chunk(self, parts: int) -> list[RoutedExpertsBatch]:
        """Split into ``parts`` runs of consecutive sequences, sizes differing by at most one."""
        if not 1 <= parts <= len(self):
            raise RoutingSchemaError(
                f"parts is {parts}, expected 1 … {len(self)}, the number of sequences: "
                "a chunk cannot be empty."
            )
        return [self.select(list(part)) for part in np.array_split(np.arange(len(self)), parts)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutedExpertsBatch):
            return NotImplemented
        return (
            self.layout == other.layout
            and self.spans == other.spans
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self._starts, other._starts)
            and np.array_equal(self._status, other._status)
            and np.array_equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"RoutedExpertsBatch({len(self)} sequences, {len(self.values)} rows, "
            f"{int(self.recorded.sum())} recorded, L={self.layout.num_moe_layers}, "
            f"k={self.layout.top_k}, E={self.layout.num_experts})"
        )

    @property
    def _status(self) -> UInt8[np.ndarray, " rows"]:
        assert self.status is not None  # filled in by the constructors
        return self.status

    @property
    def _starts(self) -> Int64[np.ndarray, " B"]:
        assert self.token_starts is not None  # filled in by the constructors
        return self.token_starts


def _check_offsets(offsets: Any, num_rows: int) -> Int64[np.ndarray, " B+1"]:
    array = np.asarray(offsets)
    if (
        array.ndim != 1
        or array.dtype.kind not in "iu"
        or len(array) < 1
        or int(array[0]) != 0
        or int(array[-1]) != num_rows
        or bool((np.diff(array.astype(np.int64)) < 0).any())
    ):
        raise RoutingSchemaError(
            f"offsets is {np.array2string(array, threshold=8)}, expected ascending integers from 0 "
            f"to {num_rows}, the number of rows: sequence b owns rows offsets[b]:offsets[b + 1]."
        )
    return array.astype(np.int64, copy=False)


def _check_starts(starts: Any, size: int) -> Int64[np.ndarray, " B"]:
    if starts is None:
        return np.zeros(size, np.int64)
    array = np.asarray(starts)
    if (
        array.shape != (size,)
        or array.dtype.kind not in "iu"
        or bool(((array < 0) | (array > MAX_POSITION)).any())
    ):
        raise RoutingSchemaError(
            f"token_starts is {np.array2string(array, threshold=8)}, expected {size} positions "
            f"from 0 to {MAX_POSITION}: give one for each sequence."
        )
    return array.astype(np.int64, copy=False)
