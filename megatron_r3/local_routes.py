"""The part of a micro-batch's routes that one rank uses: read, checked, in its routers' order.

Only rows and layers of this rank are touched, so that the routes of a global batch may lie in a
mapped file. They are checked on the host, before the forward: a wrong id on a GPU is a device
assert.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int64, UInt

from megatron_r3.errors import (
    InvalidExpertsError,
    InvalidRoutesError,
    LayoutMismatchError,
    RowCountError,
)
from megatron_r3.layout_plan import LayoutPlan
from megatron_r3.scatter import scatter
from shared_schema import (
    RoutedExperts,
    RoutedExpertsBatch,
    RoutingLayout,
    RoutingSchemaError,
    RowStatus,
    decode,
)
from shared_schema.routed_experts import check_ids_array
from shared_schema.row_checks import invalid_rows

Payload: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | os.PathLike[str]
"""One sample in the wire format: its bytes, or a file, which is mapped."""
Routes: TypeAlias = RoutedExpertsBatch | Sequence[RoutedExperts | Payload | None]
"""Routes of a micro-batch or of a batch that it is a part of; ``None`` stands for a sample without
routes, and so does one without rows in a :class:`RoutedExpertsBatch`."""


def read_local_routes(
    routes: Routes,
    plan: LayoutPlan,
    layers: Sequence[int],
    layout: RoutingLayout,
    out: UInt[np.ndarray, "L_local T k"],
    samples: Sequence[int] | None = None,
) -> Bool[np.ndarray, " T"]:
    """Write the experts of this rank's rows and layers into ``out``.

    A sample of S tokens wants rows up to position S-2 (its last token was never fed to the rollout
    engine) or S-1 (a trainer that records itself feeds every token).

    Args:
        routes: one entry for each sample.
        plan: what each local row is.
        layers: index in the layout's MoE layers of each local router.
        layout: the model's.
        out: written, in the layout's narrow dtype.
        samples: which entries of ``routes`` the micro-batch consists of; by default all.

    Returns:
        which local rows hold recorded experts; the ids of the others mean nothing.

    Raises:
        LayoutMismatchError: routes of another model, or with a layer missing or a wrong k.
        RowCountError: another number of samples, or of rows in a sample.
        InvalidExpertsError: an id out of range or repeated in a recorded row of this rank.
        InvalidRoutesError: an entry that is no route, or whose bytes cannot be decoded.

    """
    if isinstance(routes, RoutedExpertsBatch):
        chosen = _chosen(len(routes), samples, plan)
        recorded = _read_batch(routes, chosen, plan, layers, layout, out)
    elif isinstance(routes, Sequence) and not isinstance(routes, str | bytes | memoryview):
        chosen = _chosen(len(routes), samples, plan)
        recorded = _read_samples([routes[i] for i in chosen], plan, layers, layout, out)
    else:
        raise InvalidRoutesError(
            f"routes is a {type(routes).__name__}, expected a RoutedExpertsBatch or a list with "
            "one entry for each sample: put single routes into a list."
        )
    _check_experts(out, recorded, plan, layers, layout)
    return recorded


def _chosen(size: int, samples: Sequence[int] | None, plan: LayoutPlan) -> Int64[np.ndarray, " B"]:
    chosen = np.arange(size) if samples is None else np.asarray(samples, np.int64)
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < size:
        raise RowCountError(
            f"samples is {chosen.tolist()}, expected indices 0 … {size - 1} of the routes: give "
            "their places in the batch of routes."
        )
    if len(chosen) != len(plan.lengths):
        raise RowCountError(
            f"there are routes for {len(chosen)} samples, expected {len(plan.lengths)}: pass one "
            "entry for each sample of the micro-batch, None for one without routes."
        )
    return chosen


def _read_batch(
    batch: RoutedExpertsBatch,
    chosen: Int64[np.ndarray, " B"],
    plan: LayoutPlan,
    layers: Sequence[int],
    layout: RoutingLayout,
    out: UInt[np.ndarray, "L_local T k"],
) -> Bool[np.ndarray, " T"]:
    _check_layout("the batch of routes", batch.layout, batch.values, layout)
    assert batch.token_starts is not None  # filled in by the schema
    assert batch.status is not None
    starts, counts = batch.token_starts[chosen], batch.lengths[chosen]
    _check_stops(starts + counts, plan.lengths, given=counts > 0)
    source = plan.source_rows(starts, counts, batch.offsets[chosen])
    scatter(batch.values, source, layers, layout.fill_id, out)
    recorded = source >= 0
    recorded[recorded] = batch.status[source[recorded]] == RowStatus.RECORDED
    return np.asarray(recorded)


def _read_samples(
    routes: Sequence[Any],
    plan: LayoutPlan,
    layers: Sequence[int],
    layout: RoutingLayout,
    out: UInt[np.ndarray, "L_local T k"],
) -> Bool[np.ndarray, " T"]:
    recorded = np.zeros(plan.num_rows, bool)
    order = np.argsort(plan.sample, kind="stable")
    bounds = np.searchsorted(plan.sample[order], np.arange(len(routes) + 1))
    for index, route in enumerate(routes):
        rows = order[bounds[index] : bounds[index + 1]]
        if route is None or not len(rows):
            continue
        sample = _opened(route, f"sample {index}")
        _check_layout(f"sample {index}", sample.layout, sample.ids, layout)
        length = plan.lengths[index : index + 1]
        _check_stops(np.array([sample.token_stop]), length, np.array([True]), index)
        source = plan.position[rows] - sample.token_start
        source[source >= len(sample)] = -1
        run = _as_slice(rows)
        if run is None:
            part = np.empty((len(layers), len(rows), layout.top_k), layout.dtype)
            scatter(sample.ids, source, layers, layout.fill_id, part)
            out[:, rows] = part
        else:
            scatter(sample.ids, source, layers, layout.fill_id, out[:, run])
        held = source >= 0
        recorded[rows[held]] = sample.recorded[source[held]]
    return recorded


def _opened(route: Any, what: str) -> RoutedExperts:
    if isinstance(route, RoutedExperts):
        return route
    try:
        if isinstance(route, os.PathLike):
            with open(route, "rb") as file:
                route = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not isinstance(route, bytes | bytearray | memoryview | mmap.mmap):
            raise RoutingSchemaError(
                f"a {type(route).__name__}, expected RoutedExperts, their encoded bytes, the Path "
                "of a file of these, or None: make it one with shared_schema."
            )
        return decode(memoryview(route), check_ids=False)
    except (OSError, ValueError) as error:
        raise InvalidRoutesError(f"{what} cannot be read: {error}") from error


def _as_slice(rows: Int64[np.ndarray, " n"]) -> slice | None:
    """``rows`` as a slice where they are evenly spaced, as they are in Megatron's own layouts."""
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    if bool((np.diff(rows) != step).any()):
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1, step)


def _check_stops(
    stops: Int64[np.ndarray, " B"],
    lengths: Int64[np.ndarray, " B"],
    given: Bool[np.ndarray, " B"],
    first_sample: int = 0,
) -> None:
    wrong = given & (stops != lengths) & (stops != lengths - 1)
    if wrong.any():
        sample = int(np.flatnonzero(wrong)[0])
        length = int(lengths[sample])
        raise RowCountError(
            f"sample {first_sample + sample} has rows up to position {int(stops[sample]) - 1}, "
            f"expected {length - 2} or {length - 1} for its {length} tokens: mark what was not "
            "recorded in status instead of leaving it out."
        )


def _check_layout(what: str, given: RoutingLayout, ids: Any, expected: RoutingLayout) -> None:
    try:
        expected.require_same(given, what)
        check_ids_array(ids, expected)
    except RoutingSchemaError as error:
        raise LayoutMismatchError(f"{what} does not fit the model: {error}") from error
    if ids.dtype != expected.dtype:
        raise LayoutMismatchError(
            f"{what} has ids of dtype {ids.dtype}, expected {expected.dtype} for "
            f"{expected.num_experts} experts: build it with RoutedExperts(...), which narrows them."
        )


def _check_experts(
    ids: UInt[np.ndarray, "L_local T k"],
    recorded: Bool[np.ndarray, " T"],
    plan: LayoutPlan,
    layers: Sequence[int],
    layout: RoutingLayout,
) -> None:
    slots = ids.reshape(-1, 1, layout.top_k)
    bad = invalid_rows(slots, layout, np.tile(recorded, len(layers)))
    if bad.any():
        bad = bad.reshape(ids.shape[:2])
        local, row = (int(i) for i in np.argwhere(bad)[0])
        raise InvalidExpertsError(
            f"sample {int(plan.sample[row])}, position {int(plan.position[row])}, layer "
            f"{layout.moe_layers[layers[local]]} has experts {ids[local, row].tolist()}, expected "
            f"{layout.top_k} distinct ids below {layout.num_experts} ({int(bad.any(0).sum())} such "
            "rows on this rank): mark them as not recorded."
        )
