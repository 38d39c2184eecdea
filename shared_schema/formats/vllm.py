"""What vLLM returns as ``routed_experts``.

vLLM 0.22 and later: ``[rows, num_hidden_layers, k]`` in uint8 (E ≤ 256) or uint16, with a slot for
every hidden layer; those of dense layers are zero. Row ``i`` belongs to position
``routed_experts_prompt_start + i``. Over HTTP it is the base64 of a ``.npy`` file.

vLLM 0.21: two such arrays, over HTTP nested lists. The prompt's P rows stand once at the response
(``prompt_routed_experts``), O - 1 rows at each of its outputs (``routed_experts``).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt, UInt8

from shared_schema.errors import RoutingSchemaError
from shared_schema.formats.arrays import from_array, to_array
from shared_schema.formats.base64_text import from_base64, to_base64
from shared_schema.formats.nested import from_nested, to_nested
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts, concatenate


def from_vllm_native(
    array: Int[np.ndarray, "T num_hidden_layers k"],
    layout: RoutingLayout,
    token_start: int = 0,
    status: UInt8[np.ndarray, " T"] | None = None,
) -> RoutedExperts:
    """Read vLLM's array; ``token_start`` is the request's ``routed_experts_prompt_start``.

    Rows that hold the dtype's largest value, as :func:`to_vllm_native` marks them, are unrecorded.

    Raises:
        RoutingSchemaError: wrong shape, rows that break the schema, or a dense layer that is not
            zero, which means that the layers are shifted or the array is another model's.

    """
    return from_array(array, layout, token_start, layers="all", status=status)


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
    if not sentinel or routed.is_complete:
        return to_array(routed)
    dtype = np.dtype(np.uint16) if routed.layout.num_experts == 256 else routed.layout.dtype
    return to_array(routed, dtype, unrecorded=int(np.iinfo(dtype).max))


def from_vllm_base64(
    text: str | bytes, layout: RoutingLayout, token_start: int = 0
) -> RoutedExperts:
    """Read ``choices[i].routed_experts`` of vLLM's HTTP responses, the base64 of a ``.npy`` file.

    Raises:
        RoutingSchemaError: not base64, not a complete ``.npy`` file, or not this model's rows.

    """
    if text is None:
        raise RoutingSchemaError(
            "routed_experts is None, expected a base64 string: was the server started with "
            "--enable-return-routed-experts?"
        )
    return from_vllm_native(load_npy(from_base64(text)), layout, token_start)


def to_vllm_base64(routed: RoutedExperts, *, sentinel: bool = False) -> str:
    """Write what vLLM's HTTP responses hold; see :func:`to_vllm_native`."""
    return to_base64(dump_npy(to_vllm_native(routed, sentinel=sentinel)))


def from_vllm_split(
    prompt: Any, output: Any, layout: RoutingLayout, token_start: int = 0
) -> RoutedExperts:
    """Join the two halves of vLLM 0.21: nested lists, arrays, or base64 of ``.npy`` files.

    Args:
        prompt: the response's ``prompt_routed_experts``, the same for each of ``n`` outputs.
        output: one output's ``routed_experts``; ``None`` where one token only was sampled.
        layout: the model's layout.
        token_start: position of the prompt's first row.

    Raises:
        RoutingSchemaError: a half is not this model's rows.

    """
    if prompt is None:
        raise RoutingSchemaError(
            "prompt_routed_experts is None, expected the prompt's rows: ask the server for them, "
            "or read the output's rows alone with the token_start of the first."
        )
    first = _half(prompt, layout, token_start)
    if output is None:
        return first
    return concatenate([first, _half(output, layout, first.token_stop)])


def to_vllm_split(routed: RoutedExperts, prompt_rows: int) -> dict[str, Any]:
    """Write the fields of a vLLM 0.21 response with one output as nested lists.

    Args:
        routed: the rows of prompt and output.
        prompt_rows: how many of them are the prompt's.

    Raises:
        RoutingSchemaError: a row is unrecorded.

    """
    return {
        "prompt_routed_experts": to_nested(routed[:prompt_rows]),
        "routed_experts": to_nested(routed[prompt_rows:]),
    }


def read_split_fields(fields: Any, layout: RoutingLayout, token_start: int = 0) -> RoutedExperts:
    """Read the mapping that :func:`to_vllm_split` writes."""
    if not isinstance(fields, Mapping):
        raise RoutingSchemaError(
            f"the split response is a {type(fields).__name__}, expected a mapping with "
            "prompt_routed_experts and routed_experts: pass both in one."
        )
    prompt, output = fields.get("prompt_routed_experts"), fields.get("routed_experts")
    return from_vllm_split(prompt, output, layout, token_start)


def load_npy(payload: bytes) -> np.ndarray[Any, Any]:
    """View of the integer array in a ``.npy`` file; its size is checked before anything is read."""
    file = io.BytesIO(payload)
    try:
        major, _ = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
        header: Any = {
            1: np.lib.format.read_array_header_1_0,
            2: np.lib.format.read_array_header_2_0,
        }
        shape, fortran_order, dtype = header[major](file)
        size = math.prod(shape) * dtype.itemsize
    except Exception as error:  # the header is a Python literal: its parser raises many kinds
        raise RoutingSchemaError(
            f"{len(payload)} bytes are not a .npy file ({error!r}), expected one: they were cut "
            "off or altered, fetch them again."
        ) from None
    start = file.tell()
    if dtype.kind not in "iu" or min(shape, default=0) < 0 or len(payload) != start + size:
        raise RoutingSchemaError(
            f"a .npy file of {len(payload)} bytes declares {shape} of {dtype}, expected integers "
            "that fill it: it was cut off or altered, fetch it again."
        )
    return np.frombuffer(payload, dtype, offset=start).reshape(
        shape, order="F" if fortran_order else "C"
    )


def dump_npy(array: np.ndarray[Any, Any]) -> bytes:
    """``array`` as a ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _half(rows: Any, layout: RoutingLayout, token_start: int) -> RoutedExperts:
    if isinstance(rows, str | bytes):
        return from_vllm_base64(rows, layout, token_start)
    if isinstance(rows, list):
        return from_nested(rows, layout, token_start, layers="all")
    return from_vllm_native(rows, layout, token_start)
