"""Which rows hold something else than k distinct experts in each layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt

from shared_schema.layout import RoutingLayout

_BLOCK_BYTES = 1 << 17
"""Ids worked on at a time: with their scratch they stay in the L2 cache."""
_MOST_COMPARED = 32
"""Beyond that many slots, sorting is cheaper than comparing each pair."""


def invalid_rows(
    ids: Int[np.ndarray, "T L k"],
    layout: RoutingLayout,
    recorded: Bool[np.ndarray, " T"] | None = None,
) -> Bool[np.ndarray, " T"]:
    """True for each row with an id outside 0 … E-1, or one twice in a layer; any number of layers.

    Rows that are not ``recorded`` may hold anything; they are never called invalid.
    """
    invalid = np.zeros(len(ids), bool)
    if not ids.size:
        return invalid
    rows = min(len(ids), max(1, _BLOCK_BYTES // (ids[0].size * layout.dtype.itemsize)))
    compared = 1 < layout.top_k <= _MOST_COMPARED
    comparison = _Comparison(layout, rows, layers=ids.shape[1]) if compared else None
    for first in range(0, len(ids), rows):
        block, flags = ids[first : first + rows], invalid[first : first + rows]
        if recorded is not None and not recorded[first : first + rows].all():
            block = block.copy()
            block[~recorded[first : first + rows]] = np.arange(layout.top_k)
        if block.max() >= layout.num_experts or (block.dtype.kind == "i" and block.min() < 0):
            flags |= ((block < 0) | (block >= layout.num_experts)).any((1, 2))
        if comparison:
            comparison.mark_repeated(block, flags)
        elif layout.top_k > 1:
            block = np.sort(block, axis=-1)
            flags |= (block[..., 1:] == block[..., :-1]).any((1, 2))
    return invalid


class _Comparison:
    """Finds repeated ids by comparing the flat array with itself, moved by 1 … k-1 slots.

    Slots of neighbouring layers meet, too. They are kept different by a bit above the ids that is
    set in every second layer, or masked in words of eight where a byte has no bit to spare.
    """

    def __init__(self, layout: RoutingLayout, rows: int, layers: int) -> None:
        self.top_k = layout.top_k
        self.row_ids = layers * layout.top_k
        self.masked = layout.top_k == 8 and 128 < layout.num_experts <= 256
        dtype = layout.dtype if self.masked else _dtype_with_a_spare_bit(layout)
        self.slots, self.differences = np.empty((2, rows * self.row_ids), dtype)
        self.odd_layers = _odd_layers(rows * layers, layout.top_k, dtype)

    def mark_repeated(
        self, block: Int[np.ndarray, "rows L k"], invalid: Bool[np.ndarray, " rows"]
    ) -> None:
        """Set ``invalid`` where a row of ``block`` has an id twice in a layer."""
        slots = self.slots[: block.size]
        shaped = slots.reshape(block.shape)
        np.copyto(shaped, block, casting="unsafe")
        if invalid.any():
            shaped[invalid] = np.arange(self.top_k)  # out of range, they reach the spare bit
        if not self.masked:
            np.bitwise_or(slots, self.odd_layers[: block.size], out=slots)
        for distance in range(1, self.top_k):
            difference = self.differences[: block.size - distance]
            np.bitwise_xor(slots[distance:], slots[:-distance], out=difference)
            if self.masked:
                difference = self.differences[: block.size]
                words = difference.view("<u8")
                np.bitwise_or(words, _last_bytes(distance), out=words)
            if difference.min() == 0:
                invalid[np.flatnonzero(difference == 0) // self.row_ids] = True


def _dtype_with_a_spare_bit(layout: RoutingLayout) -> np.dtype[Any]:
    bits = (layout.num_experts - 1).bit_length() + 1
    return np.dtype(np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)


def _odd_layers(layers: int, top_k: int, dtype: np.dtype[Any]) -> UInt[np.ndarray, " n"]:
    marks = np.zeros((layers, top_k), dtype)
    marks[1::2] = 1 << (8 * dtype.itemsize - 1)
    return marks.reshape(-1)


def _last_bytes(count: int) -> np.uint64:
    """A word whose ``count`` last bytes are set."""
    return np.uint64((1 << 64) - (1 << (64 - 8 * count)))
