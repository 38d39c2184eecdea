"""slime's ``rollout_routed_experts``: a list of arrays ``[T, num_layers, k]``, one for a sample.

slime computes its padding rows in the arrays' own dtype and therefore holds them as int32. Rows of
zeros are those that SGLang did not have. The padding is added later, where the trainer packs
samples, so it is never in the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from shared_schema.batch import RoutedExpertsBatch
from shared_schema.errors import RoutingSchemaError
from shared_schema.formats.arrays import Layers, as_numpy, moe_rows, require_complete, spread
from shared_schema.layout import RoutingLayout


def from_slime(
    arrays: Sequence[Any], layout: RoutingLayout, *, layers: Layers | None = None
) -> RoutedExpertsBatch:
    """Take over slime's list; rows of zeros are unrecorded (``MISSING``).

    Arrays that follow each other in one block of memory and have the layout's dtype are not copied.

    Args:
        arrays: numpy arrays or CPU tensors; every sample begins at position 0.
        layout: the model's layout.
        layers: what the layer axis means; ``None`` takes what its length fits.

    Raises:
        RoutingSchemaError: not such a list, or rows that break the schema.

    """
    if not isinstance(arrays, list | tuple) or not arrays:
        raise RoutingSchemaError(
            f"routed experts are {arrays!r:.60}, expected a list with an array for each sample: "
            "pass the list whole."
        )
    samples = [as_numpy(array, layout) for array in arrays]
    if len({(s.shape[1], s.dtype) for s in samples}) > 1:
        raise RoutingSchemaError(
            f"the samples have {sorted({s.shape[1] for s in samples})} layers and dtypes "
            f"{sorted({s.dtype.name for s in samples})}, expected the same for all: they come from "
            "different models."
        )
    offsets = np.zeros(len(samples) + 1, np.int64)
    np.cumsum([len(s) for s in samples], out=offsets[1:])
    rows = _joined(samples)
    ids, status = moe_rows(rows, layout, layers, None, zeros_are_unrecorded=True)
    return RoutedExpertsBatch(ids, offsets, layout, status)


def to_slime(
    batch: RoutedExpertsBatch, dtype: Any = None, *, layers: Layers = "all"
) -> list[Int[np.ndarray, "T layers k"]]:
    """Give slime its list.

    The arrays share the batch's memory with ``dtype=None`` where, with ``layers="all"``, the model
    has no dense layers; otherwise they share one new block.

    Args:
        batch: complete sequences.
        dtype: of the arrays; slime itself holds int32, ``None`` means the layout's narrow one.
        layers: what the layer axis means.

    Raises:
        RoutingSchemaError: a row is unrecorded, which slime's list cannot say.

    """
    if not batch.recorded.all():
        for sample in batch:
            require_complete(sample)
    values = batch.values if dtype is None else batch.values.astype(dtype, copy=False)
    if layers == "all":
        values = spread(values, batch.layout)
    return np.split(values, batch.offsets[1:-1])


def _joined(samples: Sequence[Int[np.ndarray, "T layers k"]]) -> Int[np.ndarray, "rows layers k"]:
    """All rows, as one view if they lie one after the other in one block of memory."""
    filled = [s for s in samples if s.size]
    if not filled:
        return samples[0]
    end = filled[0].ctypes.data
    for sample in filled:
        if (
            not sample.flags.c_contiguous
            or sample.ctypes.data != end
            or _owner(sample) is not _owner(filled[0])
        ):
            return np.concatenate(samples)
        end += sample.nbytes
    shape = (sum(len(s) for s in filled), *filled[0].shape[1:])
    return np.lib.stride_tricks.as_strided(filled[0], shape)


def _owner(array: Any) -> Any:
    """The object whose memory ``array`` shows."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array
