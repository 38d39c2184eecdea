"""One sequence put together from the rows of several calls.

Turns of a conversation, of which each returned a suffix or everything; a rollout that was aborted
and resumed; the halves of a prefill and a decode engine; a prompt shared by several outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from shared_schema.codec import MAX_DECODED_BYTES
from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts, RowStatus, Source, Span, check_position

OnConflict = Literal["error", "as_generated", "latest"]
"""Whose row stays where several parts recorded one: all must agree, the first part's, the last's.
"""

_NO_PART = -1
_UNKNOWN = (Source.ROLLOUT, None)


def merge(
    parts: Sequence[RoutedExperts],
    length: int | None = None,
    on_conflict: OnConflict = "error",
) -> RoutedExperts:
    """Put parts of one sequence together; each says by its positions where it belongs.

    A recorded row stands before an unrecorded one. Positions that no part has, such as tool output
    between two turns that a call did not return, become ``MISSING``. Each row keeps the source and
    the weight version of the part that it comes from. Parts may come in any position order; their
    order in ``parts`` is the order in which they were generated.

    Args:
        parts: rows of the same sequence.
        length: position after the last row of the result, to add rows for tokens that were never
            fed, such as the last sampled one; ``None`` ends with the last part.
        on_conflict: whose row stays where two parts recorded the same position.
            ``"error"``: they must be equal, k slots in order; the first part's stays.
            ``"as_generated"``: the first part's, so that a token keeps the experts of the weights
            that sampled it when a rollout is resumed with newer ones.
            ``"latest"``: the last part's, as a resumed call computed the whole prefix anew.

    Returns:
        Rows from the first position of any part to ``length``.

    Raises:
        RoutingSchemaError: no parts, parts of different models, rows beyond ``length``, gaps of
            more than ``MAX_DECODED_BYTES``, or rows that differ under ``"error"``.

    Two turns; the second call returned its own rows only, and nobody the tool's two tokens:

    >>> import numpy as np
    >>> from shared_schema import RoutedExperts, RoutingLayout, merge
    >>> layout = RoutingLayout(num_experts=8, top_k=2, moe_layers=(0,), num_hidden_layers=1)
    >>> ids = np.array([[[1, 0]], [[2, 1]], [[3, 2]], [[4, 3]]])
    >>> turns = [RoutedExperts(ids, layout), RoutedExperts(ids, layout, token_start=6)]
    >>> merge(turns, length=11).recorded.astype(int).tolist()
    [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]

    A rollout that was aborted and resumed: keep what sampled each token.

    >>> aborted = RoutedExperts(ids, layout).with_origin("7")
    >>> resumed = RoutedExperts(ids[[0, 1, 3, 2, 0]], layout).with_origin("8")
    >>> whole = merge([aborted, resumed], on_conflict="as_generated")
    >>> [(span.start, span.stop, span.weight_version) for span in whole.spans]
    [(0, 4, '7'), (4, 5, '8')]

    Two outputs of one prompt, whose rows came once:

    >>> outputs = [RoutedExperts(ids[:1], layout, 4), RoutedExperts(ids[2:], layout, 4)]
    >>> [len(merge([turns[0], output])) for output in outputs]
    [5, 6]

    """
    if on_conflict not in ("error", "as_generated", "latest"):
        raise RoutingSchemaError(
            f"on_conflict is {on_conflict!r}, expected 'error', 'as_generated' or 'latest': say "
            "whose row stays."
        )
    layout = _common_layout(parts)
    filled = [part for part in parts if len(part)] or parts
    start = min(part.token_start for part in filled)
    last = max(part.token_stop for part in filled)
    stop = last if length is None else check_position(length, "length")
    if stop < last:
        raise RoutingSchemaError(
            f"length is {stop}, expected at least {last}, where the last part ends: the parts are "
            "of another sequence, or length counts something else."
        )
    gaps = (stop - start - sum(len(part) for part in parts)) * layout.row_nbytes
    if gaps > MAX_DECODED_BYTES:
        raise RoutingSchemaError(
            f"positions {start} … {stop} need {gaps} bytes for rows that no part has, expected at "
            f"most {MAX_DECODED_BYTES}: a part's token_start or the length is wrong."
        )
    merged = _Merged(layout, start, stop)
    for index, part in enumerate(parts):
        if len(part):
            merged.add(index, part, on_conflict)
    return merged.result()


def splice(prefill: RoutedExperts, decode: RoutedExperts) -> RoutedExperts:
    """Join the rows of a prefill engine with those of the decode engine that took over.

    Rows of the prompt that the decode engine did not compute are unrecorded in its half, or not in
    it. Where it did compute some, its KV cache is the one that was used: both must agree.

    Raises:
        RoutingSchemaError: the halves do not fit: of different models, swapped, with a gap between
            them, with a prompt row that neither has, or with rows that differ.

    >>> import numpy as np
    >>> from shared_schema import RoutedExperts, RoutingLayout, RowStatus, splice
    >>> layout = RoutingLayout(num_experts=8, top_k=2, moe_layers=(0,), num_hidden_layers=1)
    >>> ids = np.array([[[1, 0]], [[2, 1]], [[3, 2]]])
    >>> elsewhere = [RowStatus.NOT_COMPUTED_HERE, RowStatus.NOT_COMPUTED_HERE, RowStatus.RECORDED]
    >>> splice(RoutedExperts(ids[:2], layout), RoutedExperts(ids, layout, status=elsewhere))
    RoutedExperts(positions 0…2, 3 of 3 rows recorded, L=1, k=2, E=8)

    """
    if decode.token_start < prefill.token_start or decode.token_stop < prefill.token_stop:
        raise RoutingSchemaError(
            f"the decode half covers positions {decode.token_start} … {decode.token_stop}, "
            f"expected it to begin and end no earlier than the prefill half, {prefill.token_start} "
            f"… {prefill.token_stop}: the halves are swapped, or of different requests."
        )
    if decode.token_start > prefill.token_stop:
        raise RoutingSchemaError(
            f"the decode half starts at position {decode.token_start}, expected at most "
            f"{prefill.token_stop}, where the prefill half ends: the halves are of different "
            "requests, or one was cut off."
        )
    whole = merge([prefill, decode])
    unknown = np.flatnonzero(~whole.recorded[: len(prefill)])
    if len(unknown):
        reason = RowStatus(int(whole._status[unknown[0]])).name
        raise RoutingSchemaError(
            f"the row at position {whole.token_start + unknown[0]} is unrecorded ({reason}) in "
            f"both halves, expected all {len(prefill)} rows of the prefill half: use merge() to "
            "keep such rows as unrecorded."
        )
    return whole


class _Merged:
    """Rows under construction, and where each comes from."""

    def __init__(self, layout: RoutingLayout, start: int, stop: int) -> None:
        rows = stop - start
        self.layout = layout
        self.start = start
        self.ids = np.full(
            (rows, layout.num_moe_layers, layout.top_k), layout.fill_id, layout.dtype
        )
        self.status = np.full(rows, RowStatus.MISSING, np.uint8)
        self.part = np.full(rows, _NO_PART, np.int64)
        self.origin = np.zeros(rows, np.int64)
        self.origins: dict[tuple[Any, ...], int] = {_UNKNOWN: 0}

    def add(self, index: int, part: RoutedExperts, on_conflict: OnConflict) -> None:
        """Lay ``part`` over what is there."""
        first = part.token_start - self.start
        rows = slice(first, first + len(part))
        origin = self._origin_of_rows(part)
        there = self.status[rows]
        if (self.part[rows] == _NO_PART).all():
            taken: Any = slice(None)
        else:
            both = np.flatnonzero((there == RowStatus.RECORDED) & part.recorded)
            if on_conflict == "error" and len(both):
                self._require_equal(rows, both, index, part)
            taken = (there == RowStatus.MISSING) | ((there != RowStatus.RECORDED) & part.recorded)
            if on_conflict == "latest":
                taken[both] = True
        self.ids[rows][taken] = part.ids[taken]
        self.status[rows][taken] = part._status[taken]
        self.part[rows][taken] = index
        self.origin[rows][taken] = origin[taken]

    def result(self) -> RoutedExperts:
        """What was put together."""
        return RoutedExperts.trusted(self.ids, self.layout, self.start, self.status, self._spans())

    def _origin_of_rows(self, part: RoutedExperts) -> Int64[np.ndarray, " T"]:
        numbers = [self.origins.setdefault(span[2:], len(self.origins)) for span in part.spans]
        return np.repeat(
            np.array(numbers, np.int64), [span.stop - span.start for span in part.spans]
        )

    def _spans(self) -> tuple[Span, ...]:
        if not len(self.origin):
            return ()
        origins = list(self.origins)
        edges = [0, *(np.flatnonzero(np.diff(self.origin)) + 1).tolist(), len(self.origin)]
        return tuple(
            Span(self.start + a, self.start + b, *origins[self.origin[a]])
            for a, b in itertools.pairwise(edges)
        )

    def _require_equal(
        self, rows: slice, both: Int64[np.ndarray, " n"], index: int, part: RoutedExperts
    ) -> None:
        here, new = self.ids[rows][both], part.ids[both]
        differing = np.flatnonzero((here != new).any((1, 2)))
        if not len(differing):
            return
        row = int(differing[0])
        layer = int(np.flatnonzero((here[row] != new[row]).any(1))[0])
        one, other = here[row, layer].tolist(), new[row, layer].tolist()
        how = "in another order" if set(one) == set(other) else "different experts"
        raise RoutingSchemaError(
            f"parts {self.part[rows][both[row]]} and {index} have {one} and {other}, {how}, at "
            f"position {part.token_start + both[row]}, layer {self.layout.moe_layers[layer]} "
            f"({len(differing)} of {len(both)} shared rows differ), expected equal rows: merge "
            "with on_conflict='as_generated' to keep the earlier part's or 'latest' the later's."
        )


def _common_layout(parts: Sequence[RoutedExperts]) -> RoutingLayout:
    if not parts:
        raise RoutingSchemaError("no parts to merge, expected at least one: pass them.")
    for index, part in enumerate(parts):
        parts[0].layout.require_same(part.layout, f"part {index}")
    return parts[0].layout
