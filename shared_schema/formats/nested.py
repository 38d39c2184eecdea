"""Nested lists ``[T][layers][k]``, as JSON carries them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8

from shared_schema.errors import RoutingSchemaError
from shared_schema.formats.arrays import Layers, axis_lengths, from_array, to_array
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts


def from_nested(
    rows: Any,
    layout: RoutingLayout,
    token_start: int = 0,
    *,
    layers: Layers | None = None,
    status: UInt8[np.ndarray, " T"] | None = None,
) -> RoutedExperts:
    """Read nested lists of ids; see :func:`~shared_schema.formats.arrays.from_array`.

    Raises:
        RoutingSchemaError: lists of uneven lengths, something else than integers in them, or not
            this model's rows.

    >>> from shared_schema import RoutingLayout
    >>> layout = RoutingLayout(num_experts=8, top_k=2, moe_layers=(1,), num_hidden_layers=2)
    >>> from_nested([[[5, 3]], [[0, 7]]], layout)
    RoutedExperts(positions 0…1, 2 of 2 rows recorded, L=1, k=2, E=8)

    """
    if not isinstance(rows, list | tuple):
        raise RoutingSchemaError(
            f"nested routed experts are a {type(rows).__name__}, expected lists "
            "[tokens][layers][k]: parse the JSON first."
        )
    try:
        array = np.array(rows)
    except (ValueError, OverflowError) as error:
        raise RoutingSchemaError(
            f"nested routed experts of {len(rows)} rows are uneven ({error}), expected the same "
            "layers and k in every row: they were altered, fetch them again."
        ) from None
    if not rows:
        num_layers = next(iter(axis_lengths(layout, layers).values()))
        array = np.zeros((0, num_layers, layout.top_k), layout.dtype)
    return from_array(array, layout, token_start, layers=layers, status=status)


def to_nested(routed: RoutedExperts, *, layers: Layers = "all") -> list[Any]:
    """Write nested lists, dense layers zero.

    Raises:
        RoutingSchemaError: a row is unrecorded, which lists of ids cannot say.

    """
    nested: list[Any] = to_array(routed, layers=layers).tolist()
    return nested
