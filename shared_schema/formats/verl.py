"""verl's ``routed_experts``: a jagged nested tensor ``[B, tokens, layers, k]``.

The dtype is uint8 for E ≤ 256, else int16. Rows that are not known are zero, and false in the
``replay_mask`` beside it. torch is used only where the caller has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from shared_schema.batch import RoutedExpertsBatch
from shared_schema.errors import RoutingSchemaError
from shared_schema.formats.arrays import Layers, as_numpy, moe_rows, spread
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RowStatus

_MAX_INT16_EXPERTS = 1 << 15


def from_verl(
    routed_experts: Any,
    layout: RoutingLayout,
    replay_mask: Any = None,
    *,
    layers: Layers | None = None,
) -> RoutedExpertsBatch:
    """Take over verl's nested tensor; the batch shares its memory where the MoE layers are evenly
    spaced and every row is known.

    Args:
        routed_experts: jagged nested tensor on the CPU; every sequence begins at position 0.
        layout: the model's layout.
        replay_mask: jagged nested tensor ``[B, tokens]``, true where a row is known. ``None`` takes
            rows of zeros as unrecorded (``MISSING``).
        layers: what the layer axis means; ``None`` takes what its length fits.

    Raises:
        RoutingSchemaError: not such a tensor, or rows that break the schema.

    """
    flat, offsets = _flat(routed_experts)
    rows = as_numpy(flat, layout)
    if rows.dtype == np.int16 and layout.dtype == np.uint16:
        rows = rows.view(np.uint16)
    status = None
    if replay_mask is not None:
        known = np.asarray(_flat(replay_mask)[0].detach().cpu())
        if known.shape != (len(rows),) or known.dtype != bool:
            raise RoutingSchemaError(
                f"replay_mask has shape {known.shape} and dtype {known.dtype}, expected "
                f"{len(rows)} booleans: pass the mask that belongs to these rows."
            )
        status = np.where(known, RowStatus.RECORDED, RowStatus.MISSING).astype(np.uint8)
    ids, status = moe_rows(rows, layout, layers, status, zeros_are_unrecorded=True)
    return RoutedExpertsBatch(ids, np.asarray(offsets.detach().cpu()), layout, status)


def to_verl(batch: RoutedExpertsBatch, *, layers: Layers = "all") -> tuple[Any, Any]:
    """Give verl its nested tensor and ``replay_mask``.

    The tensor shares the batch's memory where every row is known and, with ``layers="all"``, the
    model has no dense layers. verl wants a row for each token, also for the last sampled one:
    ``merge(parts, length=number_of_tokens)`` adds it as unrecorded.

    Args:
        batch: sequences that begin at position 0.
        layers: what the layer axis of the result means.

    Raises:
        RoutingSchemaError: torch is not imported, E above 32,768, or a sequence that begins later.

    """
    torch = sys.modules.get("torch")
    if torch is None:
        raise RoutingSchemaError(
            "torch is not imported, expected it for a nested tensor: import torch first."
        )
    if batch.layout.num_experts > _MAX_INT16_EXPERTS:
        raise RoutingSchemaError(
            f"num_experts is {batch.layout.num_experts}, expected at most {_MAX_INT16_EXPERTS}: "
            "verl holds ids in int16."
        )
    starts = np.asarray(batch.token_starts)
    if starts.any():
        index = int(np.flatnonzero(starts)[0])
        raise RoutingSchemaError(
            f"sequence {index} begins at position {starts[index]}, expected 0: merge it with its "
            "earlier rows first."
        )
    values = batch.values
    if not batch.recorded.all():
        values = np.where(batch.recorded[:, None, None], values, values.dtype.type(0))
    if layers == "all":
        values = spread(values, batch.layout)
    if values.dtype == np.uint16:
        values = values.view(np.int16)
    offsets = torch.from_numpy(batch.offsets)
    nested = torch.nested.nested_tensor_from_jagged
    return (
        nested(torch.from_numpy(values), offsets=offsets),
        nested(torch.from_numpy(batch.recorded), offsets=offsets),
    )


def _flat(nested: Any) -> tuple[Any, Any]:
    """Values and offsets of a jagged nested tensor without holes."""
    if not getattr(nested, "is_nested", False) or not hasattr(nested, "offsets"):
        raise RoutingSchemaError(
            f"routed experts are a {type(nested).__name__}, expected a nested tensor of layout "
            "torch.jagged: pass what verl's batch holds."
        )
    if nested.lengths() is not None:
        raise RoutingSchemaError(
            "the nested tensor has holes between its sequences, expected none: call contiguous() "
            "on it first."
        )
    return nested.values(), nested.offsets()
