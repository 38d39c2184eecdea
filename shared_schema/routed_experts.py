"""The experts chosen for one sequence: ids, what was not recorded, and where rows came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt, UInt8

from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout
from shared_schema.row_checks import invalid_rows

MAX_POSITION = (1 << 53) - 1
"""Positions are integers that every JSON reader knows exactly."""


class RowStatus(IntEnum):
    """Whether a row was recorded and, if not, why not.

    A value above zero means that the ids of the row are unknown; the trainer routes it natively.
    """

    RECORDED = 0
    NOT_COMPUTED_HERE = 1
    """The engine did not run this token: its KV cache came from elsewhere."""
    EVICTED = 2
    """A prefix-cache hit whose routing the engine no longer held."""
    STEP_LOST = 3
    """The worker's payload of the step did not arrive."""
    CAPTURE_FAILED = 4
    """The router ran, but its choice could not be captured."""
    INVALID = 5
    """The captured ids broke the schema: out of range or repeated."""
    NOT_FED = 6
    """The token was never the input of a forward pass, such as the last sampled one."""
    MISSING = 7
    """No rows were supplied for these positions, such as a gap between two turns."""


class Source(StrEnum):
    """Who chose the experts."""

    ROLLOUT = "rollout"
    TRAINER = "trainer"
    PREDICTED = "predicted"


class Span(NamedTuple):
    """Rows of positions ``start`` … ``stop - 1`` that share their origin."""

    start: int
    stop: int
    source: Source = Source.ROLLOUT
    weight_version: str | None = None


@dataclass(frozen=True, eq=False)
class RoutedExperts:
    """Routed experts of one sequence.

    Row ``t`` holds the experts that were used when the token at position ``token_start + t`` was
    the *input* of a forward pass. P prompt and O output tokens have rows for positions
    0 … P+O-2: the last sampled token was never fed.

    Attributes:
        ids: ``[T, L, k]`` logical expert ids in the narrow dtype of ``layout``. The order of the k
            slots is the router's own and is data. Unrecorded rows hold ``layout.fill_id``.
        layout: which layers the L axis means, E and k.
        token_start: position of the first row in the sequence.
        status: ``[T]`` uint8, a :class:`RowStatus` for each row; ``None`` means all recorded.
        spans: where the rows came from; consecutive spans that cover all rows. Empty means one
            rollout span of unknown weight version.

    Arrays are kept, not copied, where they already have the right dtype and no row is unrecorded.

    Raises:
        RoutingSchemaError: the data breaks one of these rules; the message names the first offence.

    """

    ids: UInt[np.ndarray, "T L k"]
    layout: RoutingLayout
    token_start: int = 0
    status: UInt8[np.ndarray, " T"] | None = None
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        start = check_position(self.token_start, "token_start")
        ids = check_ids_array(self.ids, self.layout)
        status = check_status(self.status, len(ids))
        ids = checked_ids(ids, self.layout, status, np.zeros(1, np.int64) + start)
        object.__setattr__(self, "token_start", start)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "status", status)
        object.__setattr__(self, "spans", checked_spans(self.spans, start, start + len(ids)))

    @classmethod
    def trusted(
        cls,
        ids: UInt[np.ndarray, "T L k"],
        layout: RoutingLayout,
        token_start: int,
        status: UInt8[np.ndarray, " T"],
        spans: tuple[Span, ...],
    ) -> RoutedExperts:
        """Build from parts that are already valid, without looking at them again."""
        self = object.__new__(cls)
        for name, value in (
            ("ids", ids),
            ("layout", layout),
            ("token_start", token_start),
            ("status", status),
            ("spans", spans),
        ):
            object.__setattr__(self, name, value)
        return self

    @property
    def num_rows(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def token_stop(self) -> int:
        """Position after the last row."""
        return self.token_start + len(self.ids)

    @property
    def recorded(self) -> Bool[np.ndarray, " T"]:
        """True for each row whose ids are known."""
        return np.asarray(self._status == RowStatus.RECORDED)

    @property
    def is_complete(self) -> bool:
        """Whether every row is recorded."""
        return not self._status.any()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> RoutedExperts:
        """Rows ``start:stop`` (counted from the first row), without a copy."""
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise RoutingSchemaError(
                f"the index is {rows!r}, expected a slice of consecutive rows: use routed[a:b]."
            )
        first, last, _ = rows.indices(len(self.ids))
        last = max(first, last)
        start, stop = self.token_start + first, self.token_start + last
        return RoutedExperts.trusted(
            self.ids[first:last],
            self.layout,
            start,
            self._status[first:last],
            clip_spans(self.spans, start, stop),
        )

    def with_origin(
        self, weight_version: str | None = None, source: Source = Source.ROLLOUT
    ) -> RoutedExperts:
        """The same rows, all from ``source`` and the weights ``weight_version``, without a copy.

        Engines return rows without them; say it before rows of several calls are merged.
        """
        spans = checked_spans(
            [(self.token_start, self.token_stop, source, weight_version)] if len(self) else (),
            self.token_start,
            self.token_stop,
        )
        return RoutedExperts.trusted(self.ids, self.layout, self.token_start, self._status, spans)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutedExperts):
            return NotImplemented
        return (
            self.layout == other.layout
            and self.token_start == other.token_start
            and self.spans == other.spans
            and np.array_equal(self._status, other._status)
            and np.array_equal(self.ids, other.ids)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"RoutedExperts(positions {self.token_start}…{self.token_stop - 1}, "
            f"{int(self.recorded.sum())} of {len(self)} rows recorded, L={self.ids.shape[1]}, "
            f"k={self.layout.top_k}, E={self.layout.num_experts})"
        )

    @property
    def _status(self) -> UInt8[np.ndarray, " T"]:
        assert self.status is not None  # filled in by the constructors
        return self.status


def concatenate(parts: Sequence[RoutedExperts]) -> RoutedExperts:
    """Join parts of one sequence that follow each other without gap or overlap.

    Raises:
        RoutingSchemaError: nothing to join, another layout, or a part that starts elsewhere.

    """
    if not parts:
        raise RoutingSchemaError("no parts to concatenate, expected at least one: pass them.")
    first = parts[0]
    position = first.token_start
    for index, part in enumerate(parts):
        first.layout.require_same(part.layout, f"part {index}")
        if part.token_start != position:
            raise RoutingSchemaError(
                f"part {index} starts at position {part.token_start}, expected {position}: "
                "parts must follow each other."
            )
        position = part.token_stop
    return RoutedExperts.trusted(
        np.concatenate([p.ids for p in parts]),
        first.layout,
        first.token_start,
        np.concatenate([p._status for p in parts]),
        joined_spans(span for p in parts for span in p.spans),
    )


def check_position(value: Any, name: str) -> int:
    """Return ``value`` as an int from 0 to :data:`MAX_POSITION`, or raise naming ``name``."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or not 0 <= value <= MAX_POSITION
    ):
        raise RoutingSchemaError(
            f"{name} is {value!r:.60}, expected a position from 0 to {MAX_POSITION}: count tokens "
            "from the sequence's beginning."
        )
    return int(value)


def check_ids_array(ids: Any, layout: RoutingLayout) -> Int[np.ndarray, "T L k"]:
    """Return ``ids`` if it is an integer array ``[T, L, k]`` of this layout, or raise."""
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        raise RoutingSchemaError(
            f"ids is {describe(ids)}, expected an integer numpy array [tokens, "
            f"{layout.num_moe_layers} MoE layers, {layout.top_k}]: convert it first."
        )
    if ids.ndim != 3 or ids.shape[1:] != (layout.num_moe_layers, layout.top_k):
        raise RoutingSchemaError(
            f"ids has shape {ids.shape}, expected [tokens, {layout.num_moe_layers} MoE layers, "
            f"{layout.top_k} experts]: check that it comes from this model and lists MoE layers "
            "only."
        )
    return ids


def check_status(status: Any, num_rows: int) -> UInt8[np.ndarray, " T"]:
    """Return ``status`` as uint8 ``[num_rows]``, all recorded for ``None``, or raise."""
    if status is None:
        return np.zeros(num_rows, np.uint8)
    array = np.asarray(status)
    if array.shape != (num_rows,) or array.dtype.kind not in "iu":
        raise RoutingSchemaError(
            f"status is {describe(status)}, expected {num_rows} RowStatus values: give one for "
            "each row."
        )
    if num_rows and not 0 <= int(array.min()) <= int(array.max()) <= max(RowStatus):
        raise RoutingSchemaError(
            f"status has values {int(array.min())} … {int(array.max())}, expected RowStatus values "
            f"0 … {max(RowStatus)}: a newer writer needs a newer reader."
        )
    return array.astype(np.uint8, copy=False)


def checked_ids(
    ids: Int[np.ndarray, "T L k"],
    layout: RoutingLayout,
    status: UInt8[np.ndarray, " T"],
    positions: Int[np.ndarray, " any"],
) -> UInt[np.ndarray, "T L k"]:
    """Check recorded rows and return ids in the narrow dtype with unrecorded rows filled.

    ``positions`` holds the position of the first row, or of every row; it serves the message.
    """
    unrecorded = status != RowStatus.RECORDED
    bad = invalid_rows(ids, layout, ~unrecorded)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        position = int(positions[row]) if len(positions) == len(ids) else int(positions[0]) + row
        layer = int(np.flatnonzero(invalid_rows(ids[row][:, None], layout))[0])
        raise RoutingSchemaError(
            f"ids at position {position}, layer {layout.moe_layers[layer]} are "
            f"{ids[row, layer].tolist()}, expected {layout.top_k} distinct experts below "
            f"{layout.num_experts}: mark rows that were not recorded in status ({int(bad.sum())} "
            "such rows)."
        )
    narrow = ids.astype(layout.dtype, copy=False)
    if unrecorded.any() and (narrow[unrecorded] != layout.fill_id).any():
        if narrow is ids:
            narrow = narrow.copy()
        narrow[unrecorded] = layout.fill_id
    return narrow


def checked_spans(spans: Iterable[Any], start: int, stop: int) -> tuple[Span, ...]:
    """Return spans that cover ``start`` … ``stop - 1`` exactly, or raise."""
    if start == stop:
        return ()
    try:
        given = tuple(
            Span(int(a), int(b), Source(source), None if version is None else str(version))
            for a, b, source, version in spans
        )
    except (TypeError, ValueError) as error:
        raise RoutingSchemaError(
            f"spans is {spans!r}, expected (start, stop, source, weight_version) each: {error}."
        ) from None
    if not given:
        return (Span(start, stop),)
    edges = [start, *(s.stop for s in given)]
    if any(s.start != e or s.stop <= s.start for s, e in zip(given, edges, strict=False)) or (
        edges[-1] != stop
    ):
        raise RoutingSchemaError(
            f"spans cover {[(s.start, s.stop) for s in given]}, expected consecutive spans over "
            f"positions {start} … {stop}: every row needs one origin."
        )
    return given


def clip_spans(spans: Iterable[Span], start: int, stop: int) -> tuple[Span, ...]:
    """The parts of ``spans`` that lie in positions ``start`` … ``stop - 1``."""
    return tuple(
        span._replace(start=max(span.start, start), stop=min(span.stop, stop))
        for span in spans
        if span.start < stop and span.stop > start
    )


def joined_spans(spans: Iterable[Span]) -> tuple[Span, ...]:
    """``spans`` with neighbours of the same origin made one."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].stop == span.start and joined[-1][2:] == span[2:]:
            joined[-1] = joined[-1]._replace(stop=span.stop)
        else:
            joined.append(span)
    return tuple(joined)


def describe(value: Any) -> str:
    """What ``value`` is, for messages."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None:
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of shape {tuple(shape)} and dtype {dtype}"
