"""Base64, checked, and the flat integers that several formats put into it."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shared_schema.errors import RoutingSchemaError


def from_base64(text: Any) -> bytes:
    """The bytes of base64 ``text``, which may come as ASCII bytes."""
    if not isinstance(text, str | bytes):
        raise RoutingSchemaError(
            f"routed experts are a {type(text).__name__}, expected base64 text: pass the string "
            "of the response."
        )
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RoutingSchemaError(
            f"{len(text)} characters of routed experts are not base64 ({error}), expected it: they "
            "were cut off or altered, fetch them again."
        ) from None


def to_base64(payload: bytes | memoryview) -> str:
    """``payload`` as base64 text."""
    return base64.b64encode(payload).decode("ascii")


def array_to_base64(array: np.ndarray[Any, Any]) -> str:
    """The array's integers, row-major and little-endian, as base64 text."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return to_base64(little.data.cast("B") if little.size else b"")


def integers_of(
    payload: bytes | bytearray | memoryview, dtype: np.dtype[Any], shape: Sequence[Any]
) -> np.ndarray[Any, Any]:
    """View of little-endian integers, whose size must be that of ``shape``."""
    numbers = tuple(shape)
    if any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0 for n in numbers):
        raise RoutingSchemaError(
            f"the shape of routed experts is {numbers!r}, expected numbers of 0 or more: they were "
            "altered, fetch them again."
        )
    expected = math.prod(int(n) for n in numbers) * dtype.itemsize
    if len(payload) != expected:
        raise RoutingSchemaError(
            f"routed experts have {len(payload)} bytes, expected {expected} for shape {numbers} of "
            f"{dtype}: they were cut off or altered, fetch them again."
        )
    return np.frombuffer(payload, dtype.newbyteorder("<")).reshape(numbers)
