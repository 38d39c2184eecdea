"""Bare ``[T, layers, k]`` arrays of numpy or torch; the other formats read and write through them.

A bare array says neither which layers its axis means nor which rows are known. Rows that hold -1,
or the dtype's largest value where that is no expert, in every slot are taken as unrecorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int, UInt8

from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts, RowStatus, check_status, describe

Layers = Literal["all", "moe"]
"""What the layer axis of an array means: all hidden layers, dense ones zero, or the MoE layers."""


def from_array(
    array: Any,
    layout: RoutingLayout,
    token_start: int = 0,
    *,
    layers: Layers | None = None,
    status: UInt8[np.ndarray, " T"] | None = None,
    zeros_are_unrecorded: bool = False,
) -> RoutedExperts:
    """Read an integer array or tensor ``[T, layers, k]``, without a copy where it is valid as is.

    Args:
        array: a numpy array, or anything with torch's ``detach().cpu().numpy()``.
        layout: the model's layout.
        token_start: position of the first row.
        layers: what the layer axis means; ``None`` takes what its length fits.
        status: which rows are known; ``None`` looks for the marks of unrecorded rows.
        zeros_are_unrecorded: whether the source writes zeros where it has nothing; otherwise rows
            of zeros are refused like any other repeated expert.

    Raises:
        RoutingSchemaError: not such an array, rows that break the schema, a dense layer that is not
            zero, or rows that could be either a choice or a mark.

    >>> import numpy as np
    >>> from shared_schema import RoutingLayout
    >>> layout = RoutingLayout(num_experts=8, top_k=2, moe_layers=(1,), num_hidden_layers=2)
    >>> from_array(np.array([[[5, 3]], [[-1, -1]]]), layout).recorded.tolist()
    [True, False]

    """
    rows = as_numpy(array, layout)
    ids, status = moe_rows(rows, layout, layers, status, zeros_are_unrecorded)
    return RoutedExperts(ids, layout, token_start, status)


def to_array(
    routed: RoutedExperts,
    dtype: Any = None,
    *,
    layers: Layers = "all",
    unrecorded: int | None = None,
) -> Int[np.ndarray, "T layers k"]:
    """Write ``[T, layers, k]``, dense layers zero.

    Args:
        routed: the rows.
        dtype: of the result; ``None`` means the layout's narrow one.
        layers: what the layer axis of the result means.
        unrecorded: what unrecorded rows hold in the MoE layers.

    Raises:
        RoutingSchemaError: a row is unrecorded and ``unrecorded`` is ``None``: readers of a bare
            array would take whatever stood there for experts.

    """
    layout = routed.layout
    if unrecorded is None:
        require_complete(routed)
    ids = routed.ids.astype(layout.dtype if dtype is None else dtype, copy=False)
    if unrecorded is not None and not routed.is_complete:
        ids = np.where(routed.recorded[:, None, None], ids, np.array(unrecorded, ids.dtype))
    return ids if layers == "moe" else spread(ids, layout)


def spread(
    ids: Int[np.ndarray, "T L k"], layout: RoutingLayout
) -> Int[np.ndarray, "T num_hidden_layers k"]:
    """Rows with a slot for every hidden layer, dense ones zero; ``ids`` if there are none."""
    if layout.num_moe_layers == layout.num_hidden_layers:
        return ids
    rows = np.zeros((len(ids), layout.num_hidden_layers, layout.top_k), ids.dtype)
    rows[:, even_slice(layout.moe_layers)] = ids
    return rows


def moe_rows(
    rows: Int[np.ndarray, "T layers k"],
    layout: RoutingLayout,
    layers: Layers | None,
    status: UInt8[np.ndarray, " T"] | None,
    zeros_are_unrecorded: bool,
) -> tuple[Int[np.ndarray, "T L k"], UInt8[np.ndarray, " T"] | None]:
    """Rows of the MoE layers, a view where these are evenly spaced, and which are known.

    ``None`` as status means that all are.
    """
    layers = layers_of_axis(rows.shape[1], layout, layers)
    ids = rows[:, even_slice(layout.moe_layers)] if layers == "all" else rows
    if status is None:
        unrecorded = marked_rows(ids, layout, zeros_are_unrecorded)
        if unrecorded.any():
            status = np.where(unrecorded, RowStatus.MISSING, RowStatus.RECORDED).astype(np.uint8)
    if layers == "all":
        _check_dense_layers(rows, layout, status)
    return ids, status


def as_numpy(array: Any, layout: RoutingLayout) -> Int[np.ndarray, "T layers k"]:
    """``array`` as a numpy array of three axes, k last, sharing memory where it can."""
    if not isinstance(array, np.ndarray) and hasattr(array, "detach"):
        try:
            array = array.detach().cpu().numpy()
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise RoutingSchemaError(
                f"routed experts are {describe(array)}, which numpy cannot view ({error}), "
                "expected a dense integer tensor: convert it first."
            ) from None
    if (
        not isinstance(array, np.ndarray)
        or array.ndim != 3
        or array.dtype.kind not in "iu"
        or array.shape[2] != layout.top_k
    ):
        raise RoutingSchemaError(
            f"routed experts are {describe(array)}, expected integers [tokens, layers, "
            f"{layout.top_k} experts]: check that they come from this model."
        )
    return array


def layers_of_axis(length: int, layout: RoutingLayout, layers: Layers | None) -> Layers:
    """What a layer axis of this length means, or raise if it is not ``layers`` or fits nothing."""
    lengths = axis_lengths(layout, layers)
    for meaning, expected in lengths.items():
        if length == expected:
            return meaning
    wanted = " or ".join(f"{expected} ({meaning})" for meaning, expected in lengths.items())
    raise RoutingSchemaError(
        f"routed experts have {length} layers, expected {wanted}: check that they come from this "
        "model."
    )


def axis_lengths(layout: RoutingLayout, layers: Layers | None) -> dict[Layers, int]:
    """Length of the layer axis for each meaning that it can have, given ``layers`` if known."""
    lengths: dict[Layers, int] = {"all": layout.num_hidden_layers, "moe": layout.num_moe_layers}
    if layers is None:
        return lengths
    if layers not in lengths:
        raise RoutingSchemaError(
            f"layers is {layers!r}, expected 'all' for all hidden layers or 'moe' for MoE layers "
            "only: say what the layer axis means."
        )
    return {layers: lengths[layers]}


def even_slice(layers: Sequence[int]) -> slice | list[int]:
    """``layers`` as a slice, which indexes without a copy, where they are evenly spaced."""
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    spaced = range(layers[0], layers[-1] + 1, step)
    return slice(spaced.start, spaced.stop, step) if list(spaced) == list(layers) else list(layers)


def marked_rows(
    ids: Int[np.ndarray, "T L k"], layout: RoutingLayout, zeros_are_unrecorded: bool
) -> Bool[np.ndarray, " T"]:
    """True for each row that holds a mark for *unrecorded* in every slot."""
    marked = np.zeros(len(ids), bool)
    largest = int(np.iinfo(ids.dtype).max)
    if ids.dtype.kind == "i":
        marked |= rows_of(ids, -1)
    if largest >= layout.num_experts:
        marked |= rows_of(ids, largest)
    zeros = rows_of(ids, 0)
    if zeros.any() and layout.top_k == 1:
        raise RoutingSchemaError(
            f"{int(zeros.sum())} rows, the first of them row {int(zeros.argmax())}, are zero in "
            f"all {layout.num_moe_layers} MoE layers, expected to know whether that is expert 0 or "
            "nothing: pass status."
        )
    return marked | zeros if zeros_are_unrecorded else marked


def require_complete(routed: RoutedExperts) -> None:
    """Raise, naming the row and the reason, if a row is unrecorded."""
    if not routed.is_complete:
        row = int(np.flatnonzero(~routed.recorded)[0])
        reason = RowStatus(int(routed._status[row])).name
        raise RoutingSchemaError(
            f"the row at position {routed.token_start + row} is unrecorded ({reason}), expected a "
            "complete sequence: keep the RoutedExperts, or choose a format that can mark such rows."
        )


def rows_of(ids: Int[np.ndarray, "T L k"], slots: Any) -> Bool[np.ndarray, " T"]:
    """True for each row that holds ``slots``, one value or k, in every layer.

    Most rows are ruled out by their first layer.
    """
    rows: Bool[np.ndarray, " T"] = (ids[:, 0] == slots).all(1)
    candidates = np.flatnonzero(rows)
    rows[candidates] = (ids[candidates] == slots).all((1, 2))
    return rows


def _check_dense_layers(rows: Int[np.ndarray, "T H k"], layout: RoutingLayout, status: Any) -> None:
    dense = sorted(set(range(layout.num_hidden_layers)).difference(layout.moe_layers))
    if not dense:
        return
    used = rows[:, even_slice(dense)]
    if status is not None:
        used = used[check_status(status, len(rows)) == RowStatus.RECORDED]
    if used.any():
        layer = dense[int(np.flatnonzero(used.any((0, 2)))[0])]
        raise RoutingSchemaError(
            f"dense layer {layer} holds ids, expected zeros: the layers are shifted, or the rows "
            "come from another model."
        )
