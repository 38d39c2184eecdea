"""To and from the array that vLLM returns as ``routed_experts``.

vLLM 0.22 and later: ``[rows, num_hidden_layers, k]`` in uint8 (E ≤ 256) or uint16, with a slot for
every hidden layer; those of dense layers are zero. Row ``i`` belongs to position
``routed_experts_prompt_start + i``. Over HTTP it is the base64 of a ``.npy`` file.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
from jaxtyping import Int, UInt, UInt8

from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts, RowStatus


def from_vllm_native(
    array: Int[np.ndarray, "T num_hidden_layers k"],
    layout: RoutingLayout,
    token_start: int = 0,
    status: UInt8[np.ndarray, " T"] | None = None,
) -> RoutedExperts:
    """Read vLLM's array; ``token_start`` is the request's ``routed_experts_prompt_start``.

    Raises:
        RoutingSchemaError: wrong shape, rows that break the schema, or a dense layer that is not
            zero, which means that the layers are shifted or the array is another model's.

    """
    array = np.asarray(array)
    expected = (layout.num_hidden_layers, layout.top_k)
    if array.ndim != 3 or array.shape[1:] != expected or array.dtype.kind not in "iu":
        raise RoutingSchemaError(
            f"the array has shape {array.shape} and dtype {array.dtype}, expected integers "
            f"[rows, {expected[0]} hidden layers, {expected[1]} experts]: check that it comes from "
            "this model."
        )
    moe = list(layout.moe_layers)
    dense = np.delete(array, moe, axis=1)
    if status is not None:
        dense = dense[np.asarray(status) == RowStatus.RECORDED]
    if dense.any():
        layers = np.setdiff1d(np.arange(layout.num_hidden_layers), moe)
        layer = int(layers[np.flatnonzero(dense.any((0, 2)))[0]])
        raise RoutingSchemaError(
            f"dense layer {layer} holds ids, expected zeros: the layers are shifted, or the array "
            "comes from another model."
        )
    return RoutedExperts(array[:, moe], layout, token_start, status)


def to_vllm_native(
    routed: RoutedExperts, *, sentinel: bool = False
) -> UInt[np.ndarray, "T num_hidden_layers k"]:
    """Write vLLM's array, dense layers zero.

    With ``sentinel`` every slot of an unrecorded row, in MoE layers, holds the dtype's largest
    value; the dtype is widened to uint16 when E = 256 needs all of uint8.

    Raises:
        RoutingSchemaError: a row is unrecorded and ``sentinel`` is off; readers of a bare array
            would take whatever stood there for experts.

    """
    layout = routed.layout
    dtype = layout.dtype
    if not routed.is_complete:
        if not sentinel:
            row = int(np.flatnonzero(~routed.recorded)[0])
            reason = RowStatus(int(routed._status[row])).name
            raise RoutingSchemaError(
                f"the row at position {routed.token_start + row} is unrecorded ({reason}), "
                "expected a complete sequence: keep the RoutedExperts, or pass sentinel=True."
            )
        if layout.num_experts == 256:
            dtype = np.dtype(np.uint16)
    array = np.zeros((len(routed), layout.num_hidden_layers, layout.top_k), dtype)
    ids = routed.ids.astype(dtype, copy=False)
    if dtype != layout.dtype:
        ids = np.where(routed.recorded[:, None, None], ids, np.iinfo(dtype).max)
    array[:, list(layout.moe_layers)] = ids
    return array


def from_vllm_base64(
    text: str | bytes, layout: RoutingLayout, token_start: int = 0
) -> RoutedExperts:
    """Read ``choices[i].routed_experts`` of vLLM's HTTP responses, the base64 of a ``.npy`` file.

    Raises:
        RoutingSchemaError: not base64, not a complete ``.npy`` file, or not this model's rows.

    """
    return from_vllm_native(_load_npy(text), layout, token_start)


def _load_npy(text: str | bytes) -> np.ndarray[Any, Any]:
    if not isinstance(text, str | bytes):
        raise RoutingSchemaError(
            f"routed_experts is {text!r}, expected a base64 string: was the server started with "
            "--enable-return-routed-experts?"
        )
    try:
        payload = base64.b64decode(text, validate=True)
        return np.asarray(np.load(io.BytesIO(payload), allow_pickle=False))
    except (binascii.Error, ValueError, EOFError, OSError, SyntaxError) as error:
        raise RoutingSchemaError(
            f"routed_experts of {len(text)} characters is not the base64 of a complete .npy file "
            f"({error}), expected vLLM's encoding: it was cut off or altered, fetch it again."
        ) from None
