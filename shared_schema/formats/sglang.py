"""SGLang's ``meta_info["routed_experts"]``: base64 of flat int32 ``[T, num_hidden_layers, k]``.

Neither shape nor dtype is in it; ``routed_experts_dtype`` beside it names another dtype. The first
row belongs to position ``routed_experts_start_len`` of the request; P prompt and O output tokens
have rows up to position P + O - 2. Dense layers are zero, and so are rows that SGLang does not
have, for example after a prefill elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8

from shared_schema.errors import RoutingSchemaError
from shared_schema.formats.arrays import Layers, axis_lengths, from_array, to_array
from shared_schema.formats.base64_text import array_to_base64, from_base64, integers_of
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts

_DTYPES = {name: np.dtype(name) for name in ("int32", "uint16", "uint8")}


def from_sglang(
    text: Any,
    layout: RoutingLayout,
    token_start: int = 0,
    *,
    dtype: str = "int32",
    num_rows: int | None = None,
    layers: Layers | None = None,
    status: UInt8[np.ndarray, " T"] | None = None,
) -> RoutedExperts:
    """Read the base64 text; rows of zeros are unrecorded (``MISSING``).

    Args:
        text: the base64 text.
        layout: the model's layout.
        token_start: the request's ``routed_experts_start_len``.
        dtype: the response's ``routed_experts_dtype``, if it has one.
        num_rows: P + O - 1 - token_start, if known.
        layers: what the layer axis means; needed where size, ``num_rows`` and content fit both.
        status: which rows are known; ``None`` takes rows of zeros as unrecorded.

    Raises:
        RoutingSchemaError: not base64, rows that break the schema, or bytes that are valid for both
            meanings of the layer axis.

    """
    if dtype not in _DTYPES:
        raise RoutingSchemaError(
            f"dtype is {dtype!r}, expected {', '.join(_DTYPES)}: pass the response's "
            "routed_experts_dtype."
        )
    payload = from_base64(text)
    shapes = _fitting_shapes(len(payload) // _DTYPES[dtype].itemsize, layout, num_rows, layers)
    readings: dict[Layers, RoutedExperts] = {}
    for meaning, shape in shapes.items():
        ids = integers_of(payload, _DTYPES[dtype], shape)
        try:
            readings[meaning] = from_array(
                ids, layout, token_start, layers=meaning, status=status, zeros_are_unrecorded=True
            )
        except RoutingSchemaError:
            if len(shapes) == 1:
                raise
    if len(readings) == 1 or (readings and not payload):
        return next(iter(readings.values()))
    sizes = [f"{rows} rows of {length} layers ({m})" for m, (rows, length, _) in shapes.items()]
    if readings:
        raise RoutingSchemaError(
            f"{len(payload)} bytes of {dtype} are {' or '.join(sizes)}, expected to know which: "
            "pass layers='all', as SGLang writes, or 'moe', or num_rows."
        )
    raise RoutingSchemaError(
        f"{len(payload)} bytes of {dtype} are {' or '.join(sizes) or 'no whole rows'}, expected "
        f"{'this model' if num_rows is None else f'{num_rows} rows of this model'}'s routes with k "
        f"{layout.top_k}: they were cut off, or come from another model."
    )


def to_sglang(routed: RoutedExperts, *, layers: Layers = "all") -> str:
    """Write the base64 text, dense layers zero.

    Raises:
        RoutingSchemaError: a row is unrecorded; zeros would be taken for expert 0.

    """
    return array_to_base64(to_array(routed, np.int32, layers=layers))


def _fitting_shapes(
    num_ids: int, layout: RoutingLayout, num_rows: int | None, layers: Layers | None
) -> dict[Layers, tuple[int, int, int]]:
    """Meanings of the layer axis that make whole rows, ``num_rows`` of them if given."""
    shapes: dict[Layers, tuple[int, int, int]] = {}
    for meaning, length in axis_lengths(layout, layers).items():
        rows, rest = divmod(num_ids, length * layout.top_k)
        shape = (rows, length, layout.top_k)
        if not rest and num_rows in (None, rows) and shape not in shapes.values():
            shapes[meaning] = shape
    return shapes
