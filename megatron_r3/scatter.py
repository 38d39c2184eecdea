"""Bring rows of routes into a router's order, ``[rows, L, k]`` to ``[L_local, T, k]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

_ROWS_IN_CACHE = 2048
_WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


def scatter(
    values: UInt[np.ndarray, "rows L k"],
    source: Int[np.ndarray, " T"],
    layers: Sequence[int],
    fill: int,
    out: UInt[np.ndarray, "L_local T k"],
) -> None:
    """Copy the rows ``source`` of ``values`` into ``out``, of the layers ``layers`` alone.

    One index-select of the bytes that hold the layers, in blocks that stay in the cache while they
    are transposed; the k ids of a row and layer move as one word. Other rows and layers are not
    read.

    Args:
        values: ids, read-only or memory-mapped as they may be.
        source: row of ``values`` for each row of ``out``; a negative one leaves ``fill``.
        layers: index on the L axis of each layer of ``out``.
        fill: id for rows without a source.
        out: written; of the dtype of ``values``.

    """
    if not out.size:
        return
    missing = np.flatnonzero(source < 0)
    if len(missing) == len(source):
        out[:] = fill
        return
    k, size = values.shape[2], values.dtype.itemsize
    low, high = min(layers), max(layers) + 1
    # np.asarray, since slices of a memmap are slow objects.
    window = np.asarray(values)[:, low:high]
    if window.strides[1:] != (k * size, size):
        window = np.ascontiguousarray(window)
    rows = window.reshape(len(values), -1).view(f"V{(high - low) * k * size}")[:, 0]
    word = np.dtype(_WORDS.get(k * size, f"V{k * size}"))
    target = out.view(word)[..., 0]
    columns: Any = np.asarray(layers) - low
    if np.array_equal(columns, np.arange(high - low)):
        columns = slice(None)
    for first in range(0, len(source), _ROWS_IN_CACHE):
        block = slice(first, first + _ROWS_IN_CACHE)
        picked = rows[np.maximum(source[block], 0)].view(word).reshape(-1, high - low)
        target[:, block] = picked[:, columns].T
    if len(missing):
        out[:, missing] = fill
