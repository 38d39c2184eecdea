"""Routes are checked on the host before the forward: a wrong id on a GPU is a device assert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Int64

from megatron_r3.errors import InvalidExpertsError, LayoutMismatchError, RowCountError
from shared_schema import RoutedExperts, RoutedExpertsBatch, RoutingLayout, RoutingSchemaError
from shared_schema.routed_experts import check_ids_array, invalid_rows

Routes: TypeAlias = RoutedExpertsBatch | Sequence[RoutedExperts | None]
"""Routes of a micro-batch; ``None`` stands for a sample without routes."""


def checked_routes(
    routes: Routes, layout: RoutingLayout, lengths: Int64[np.ndarray, " B"]
) -> RoutedExpertsBatch:
    """Return ``routes`` as one ragged batch that fits the model and the micro-batch.

    A sample of S tokens wants rows up to position S-2 (its last token was never fed to the rollout
    engine) or S-1 (a trainer that records itself feeds every token).

    Args:
        routes: one entry for each sample.
        layout: the model's.
        lengths: ``[B]`` tokens of each sample.

    Raises:
        LayoutMismatchError: routes of another model, or with a layer missing or a wrong k.
        RowCountError: another number of samples, or of rows in a sample.
        InvalidExpertsError: an id out of range or repeated in a recorded row.

    """
    absent = np.zeros(len(lengths), bool)
    if isinstance(routes, RoutedExpertsBatch):
        _check_layout("the batch of routes", routes.layout, routes.values, layout)
    else:
        absent = np.array([sample is None for sample in routes], bool)
        routes = _joined(routes, layout)
    if len(routes) != len(lengths):
        raise RowCountError(
            f"there are routes for {len(routes)} samples, expected {len(lengths)}: pass one entry "
            "for each sample of the micro-batch, None for one without routes."
        )
    starts = routes.token_starts
    assert starts is not None  # filled in by the schema
    stops = starts + routes.lengths
    wrong = ~absent & (stops != lengths) & (stops != lengths - 1)
    if wrong.any():
        sample = int(np.flatnonzero(wrong)[0])
        raise RowCountError(
            f"sample {sample} has rows up to position {int(stops[sample]) - 1}, expected "
            f"{int(lengths[sample]) - 2} or {int(lengths[sample]) - 1} for its "
            f"{int(lengths[sample])} tokens: mark what was not recorded in status instead of "
            "leaving it out."
        )
    bad = invalid_rows(routes.values, layout) & routes.recorded
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        sample = int(np.searchsorted(routes.offsets, row, side="right")) - 1
        position = row - int(routes.offsets[sample]) + int(starts[sample])
        layer = int(np.flatnonzero(invalid_rows(routes.values[row][:, None], layout))[0])
        raise InvalidExpertsError(
            f"sample {sample}, position {position}, layer {layout.moe_layers[layer]} has experts "
            f"{routes.values[row, layer].tolist()}, expected {layout.top_k} distinct ids below "
            f"{layout.num_experts} ({int(bad.sum())} such rows): mark them as not recorded."
        )
    return routes


def _joined(samples: Sequence[RoutedExperts | None], layout: RoutingLayout) -> RoutedExpertsBatch:
    nothing = RoutedExperts(
        np.zeros((0, layout.num_moe_layers, layout.top_k), layout.dtype), layout
    )
    given = [nothing if sample is None else sample for sample in samples]
    for index, sample in enumerate(given):
        _check_layout(f"sample {index}", sample.layout, sample.ids, layout)
    return RoutedExpertsBatch.from_list(given or [nothing]).select(range(len(given)))


def _check_layout(what: str, given: RoutingLayout, ids: object, expected: RoutingLayout) -> None:
    try:
        expected.require_same(given, what)
        check_ids_array(ids, expected)
    except RoutingSchemaError as error:
        raise LayoutMismatchError(f"{what} does not fit the model: {error}") from error
