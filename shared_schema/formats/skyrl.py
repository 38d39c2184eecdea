"""Envelopes of SkyRL and prime-rl: ``{data, shape, dtype}``, prime-rl's with ``start``.

SkyRL: ``data`` (first, so that a reader can slice it out), ``shape``, ``dtype``; base64 of uint8,
int16 or int32, whichever is the narrowest for the largest id that occurs. Its training batches fill
rows that were not captured with experts 0 … k-1 and say so in ``router_padding_mask``.

prime-rl: over HTTP ``data`` (base64), ``shape``, ``start``, ``dtype`` (uint8 or uint16); between
its processes a msgspec struct of raw bytes, shape and dtype, which msgpack carries as an array in
that order. Rows that were not captured are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from shared_schema.errors import RoutingSchemaError
from shared_schema.formats.arrays import Layers, as_numpy, from_array, rows_of, to_array
from shared_schema.formats.base64_text import array_to_base64, from_base64, integers_of
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts

_DTYPES = {name: np.dtype(name) for name in ("uint8", "uint16", "int16", "int32")}


def from_skyrl(
    envelope: Any,
    layout: RoutingLayout,
    token_start: int = 0,
    *,
    layers: Layers | None = None,
    status: UInt8[np.ndarray, " T"] | None = None,
) -> RoutedExperts:
    """Read SkyRL's envelope.

    Args:
        envelope: the mapping ``{"data": base64 text, "shape": [T, layers, k], "dtype": name}``.
        layout: the model's layout.
        token_start: position of the first row.
        layers: what the layer axis means; ``None`` takes what its length fits.
        status: which rows are known, ``MISSING`` where SkyRL's ``router_padding_mask`` is true.

    Raises:
        RoutingSchemaError: not such an envelope, rows that break the schema, or, without
            ``status``, rows of experts 0 … k-1 in all layers, which SkyRL uses as padding.

    """
    array = as_numpy(_array(envelope), layout)
    if status is None:
        padding = rows_of(array, np.arange(layout.top_k))
        if padding.any():
            raise RoutingSchemaError(
                f"{int(padding.sum())} rows, the first of them row {int(padding.argmax())}, are "
                f"experts 0 … {layout.top_k - 1} in all layers as SkyRL's padding is, expected to "
                "know which rows are padding: pass status, MISSING where router_padding_mask is "
                "true."
            )
    return from_array(array, layout, token_start, layers=layers, status=status)


def to_skyrl(routed: RoutedExperts, *, layers: Layers = "all") -> dict[str, Any]:
    """Write SkyRL's envelope, dense layers zero.

    Raises:
        RoutingSchemaError: a row is unrecorded, which the envelope cannot say.

    """
    largest = int(routed.ids.max(initial=0))
    dtype = np.uint8 if largest < 1 << 8 else np.int16 if largest < 1 << 15 else np.int32
    array = to_array(routed, dtype, layers=layers)
    return {
        "data": array_to_base64(array),
        "shape": list(array.shape),
        "dtype": array.dtype.name,
    }


def from_prime_rl(
    envelope: Any,
    layout: RoutingLayout,
    token_start: int | None = None,
    *,
    layers: Layers | None = None,
    status: UInt8[np.ndarray, " T"] | None = None,
) -> RoutedExperts:
    """Read prime-rl's envelope or struct; rows of zeros are unrecorded (``MISSING``).

    Args:
        envelope: the mapping, the struct, or the struct's array ``[data, shape, dtype]``.
        layout: the model's layout.
        token_start: position of the first row, where the envelope has no ``start``.
        layers: what the layer axis means; ``None`` takes what its length fits.
        status: which rows are known; ``None`` takes rows of zeros as unrecorded.

    Raises:
        RoutingSchemaError: not such an envelope, another start than ``token_start``, or rows that
            break the schema.

    """
    start = _field(envelope, "start", 0 if token_start is None else token_start)
    if token_start not in (None, start):
        raise RoutingSchemaError(
            f"token_start is {token_start}, expected {start!r} as the envelope says: leave it out."
        )
    return from_array(
        _array(envelope), layout, start, layers=layers, status=status, zeros_are_unrecorded=True
    )


def to_prime_rl(routed: RoutedExperts, *, layers: Layers = "all") -> dict[str, Any]:
    """Write prime-rl's HTTP envelope, dense layers zero.

    Raises:
        RoutingSchemaError: a row is unrecorded; zeros would be taken for expert 0.

    """
    array = to_array(routed, layers=layers)
    return {
        "data": array_to_base64(array),
        "shape": list(array.shape),
        "start": routed.token_start,
        "dtype": array.dtype.name,
    }


def _array(envelope: Any) -> Int[np.ndarray, "..."]:
    data, shape = _field(envelope, "data"), _field(envelope, "shape")
    name = _field(envelope, "dtype", "uint8")
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise RoutingSchemaError(
            f"the envelope's dtype is {name!r}, expected {', '.join(_DTYPES)}: it was altered, or "
            "written by a newer version."
        )
    if not isinstance(shape, list | tuple):
        raise RoutingSchemaError(
            f"the envelope's shape is {shape!r}, expected [tokens, layers, k]: it was altered, "
            "fetch it again."
        )
    payload = data if isinstance(data, bytes | bytearray | memoryview) else from_base64(data)
    return integers_of(payload, dtype, shape)


_REQUIRED: Any = object()


def _field(envelope: Any, name: str, default: Any = _REQUIRED) -> Any:
    """Field of a mapping, of a struct, or of a struct's array ``[data, shape, dtype]``."""
    fields = envelope
    if isinstance(envelope, list | tuple):
        fields = dict(zip(("data", "shape", "dtype"), envelope, strict=False))
    if isinstance(fields, Mapping):
        value = fields.get(name, default)
    else:
        value = getattr(fields, name, default)
    if value is _REQUIRED:
        raise RoutingSchemaError(
            f"the envelope is a {type(envelope).__name__} without {name}, expected data, shape and "
            "dtype: pass the envelope whole."
        )
    return value
