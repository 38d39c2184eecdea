"""Routed experts as bytes for HTTP and disk; ``FORMAT.md`` specifies them."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt, UInt8

from shared_schema.bit_packing import bits_per_id, pack, packed_nbytes, unpack
from shared_schema.container import FOREIGN, Contents, Plane, integer, read, tensor, write
from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import (
    RoutedExperts,
    RowStatus,
    check_status,
    checked_spans,
)

MAX_DECODED_BYTES = 1 << 30
"""Default limit of what :func:`decode` allocates for ids: a million tokens of Kimi-K2."""


def encode(routed: RoutedExperts, *, packed: bool = True) -> bytes:
    """Write one sequence; :func:`decode` is the inverse.

    Args:
        routed: unrecorded rows cost one byte for the reason, or none where all share it.
        packed: write ids of ceil(log2 E) bits where that is less than 8 or 16. Without it they
            are raw, which :func:`decode` views without a copy.

    Raises:
        RoutingSchemaError: more spans than a header holds.

    """
    layout, ids, recorded = routed.layout, routed.ids, routed.recorded
    num_carried = int(np.count_nonzero(recorded))
    selector = _selector(recorded, num_carried)
    if selector == "suffix":
        ids = ids[len(ids) - num_carried :]
    elif selector == "bitmap":
        ids = ids[recorded]
    bits = bits_per_id(layout.num_experts)
    planes = {}
    if packed and bits % 8:
        flat = np.ascontiguousarray(ids).reshape(-1)
        planes["packed_ids"] = Plane(
            "U8", (packed_nbytes(ids.size, bits),), lambda out: pack(flat, bits, out)
        )
    else:
        planes["ids"] = _plane(ids, _raw_dtype(layout))
    if selector == "bitmap":
        planes["recorded"] = _plane(np.packbits(recorded, bitorder="little"))
    if num_carried < len(routed):
        reasons = routed._status[~recorded]
        planes["status"] = _plane(reasons[:1] if (reasons == reasons[0]).all() else reasons)
    return write(
        {
            **layout.to_dict(),
            "token_start": routed.token_start,
            "num_rows": len(routed),
            "selector": selector,
            "num_carried": num_carried,
            "spans": [list(span) for span in routed.spans],
        },
        planes,
    )


def decode(
    payload: bytes | bytearray | memoryview,
    expect: RoutingLayout | None = None,
    *,
    max_bytes: int = MAX_DECODED_BYTES,
    check_ids: bool = True,
) -> RoutedExperts:
    """Read what :func:`encode` wrote.

    Raw ids of a sequence that is complete are a view into ``payload``, not a copy.

    Args:
        payload: the bytes, or a buffer such as a memory-mapped file.
        expect: the layout of the model at hand; a payload of another model is refused.
        max_bytes: the most bytes of ids to allocate. A small payload may stand for many
            unrecorded rows.
        check_ids: whether to look for ids that are out of range or repeated, which takes as long
            as unpacking. Without it the caller must check the rows that it uses. The checksum
            is verified in any case.

    Raises:
        RoutingSchemaError: whatever is wrong with the payload. Nothing is executed, and nothing
            much larger than the payload is allocated before it is known to be whole.

    """
    contents = read(payload)
    fields = contents.fields
    layout = _layout(fields)
    if expect is not None:
        expect.require_same(layout, "the payload")
    start, num_rows = integer(fields, "token_start"), integer(fields, "num_rows")
    num_carried = integer(fields, "num_carried")
    selector = fields.get("selector")
    is_view = "ids" in contents.tensors and selector == "all"
    nbytes = num_rows * layout.row_nbytes
    if nbytes > max_bytes and not is_view:
        raise RoutingSchemaError(
            f"the payload stands for {nbytes} bytes of ids, expected at most {max_bytes}: pass a "
            "larger max_bytes to decode if it is meant to be that long."
        )
    _check_presence(contents, "recorded", selector == "bitmap")
    _check_presence(contents, "status", num_carried < num_rows)
    ids = _carried_ids(contents, layout, num_carried)
    recorded = _recorded(contents, selector, num_rows, num_carried)
    status = np.zeros(num_rows, np.uint8)
    if num_carried < num_rows:
        carried = ids
        ids = np.full((num_rows, *carried.shape[1:]), layout.fill_id, layout.dtype)
        ids[recorded] = carried
        status[~recorded] = _reasons(contents, num_rows - num_carried)
    spans = _spans(fields, num_rows)
    if check_ids:
        return RoutedExperts(ids, layout, start, status, spans)
    spans = checked_spans(spans, start, start + num_rows)
    return RoutedExperts.trusted(ids, layout, start, status, spans)


def _selector(recorded: Bool[np.ndarray, " T"], num_carried: int) -> str:
    if num_carried == len(recorded):
        return "all"
    return "suffix" if recorded[len(recorded) - num_carried :].all() else "bitmap"


def _plane(array: np.ndarray[Any, Any], dtype: str = "U8") -> Plane:
    def fill(out: UInt8[np.ndarray, " nbytes"]) -> None:
        np.copyto(out.view("u1" if dtype == "U8" else "<u2").reshape(array.shape), array)

    return Plane(dtype, array.shape, fill)


def _raw_dtype(layout: RoutingLayout) -> str:
    return "U8" if layout.dtype.itemsize == 1 else "U16"


def _layout(fields: dict[str, Any]) -> RoutingLayout:
    layers = fields.get("moe_layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise RoutingSchemaError(
            f"moe_layers is {reprlib.repr(layers)}, expected a list of integers: {FOREIGN}."
        )
    sizes = {name: integer(fields, name) for name in ("num_experts", "top_k", "num_hidden_layers")}
    return RoutingLayout(moe_layers=tuple(layers), **sizes)


def _spans(fields: dict[str, Any], num_rows: int) -> tuple[Any, ...]:
    spans = fields.get("spans")
    if (
        not isinstance(spans, list)
        or bool(spans) != bool(num_rows)
        or not all(
            isinstance(span, list)
            and len(span) == 4
            and type(span[0]) is type(span[1]) is int
            and isinstance(span[2], str)
            and isinstance(span[3], str | None)
            for span in spans
        )
    ):
        raise RoutingSchemaError(
            f"spans is {reprlib.repr(spans)}, expected a list of [start, stop, source, "
            f"weight_version] for {num_rows} rows: {FOREIGN}."
        )
    return tuple(spans)


def _check_presence(contents: Contents, name: str, expected: bool) -> None:
    if (name in contents.tensors) != expected:
        raise RoutingSchemaError(
            f"the tensor {name} is {'absent' if expected else 'present'}, expected it if and only "
            f"if the selector and the number of rows carried ask for it: {FOREIGN}."
        )


def _carried_ids(
    contents: Contents, layout: RoutingLayout, num_carried: int
) -> UInt[np.ndarray, "R L k"]:
    shape = (num_carried, layout.num_moe_layers, layout.top_k)
    bits = bits_per_id(layout.num_experts)
    if ("ids" in contents.tensors) == ("packed_ids" in contents.tensors):
        raise RoutingSchemaError(
            f"the payload has tensors {reprlib.repr(sorted(contents.tensors))}, expected one of "
            f"ids and packed_ids: {FOREIGN}."
        )
    if "ids" in contents.tensors:
        return tensor(contents, "ids", _raw_dtype(layout), shape)
    if bits % 8 == 0:
        raise RoutingSchemaError(
            f"the payload has packed_ids of {bits} bits, expected raw ids for "
            f"{layout.num_experts} experts: {FOREIGN}."
        )
    num_ids = num_carried * layout.num_moe_layers * layout.top_k
    stream = tensor(contents, "packed_ids", "U8", (packed_nbytes(num_ids, bits),))
    if num_ids * bits % 8 and stream[-1] >> num_ids * bits % 8:
        raise RoutingSchemaError(
            f"packed_ids ends in {int(stream[-1]):#010b}, expected zeros above its lowest "
            f"{num_ids * bits % 8} bits: {FOREIGN}."
        )
    return unpack(stream, bits, num_ids).reshape(shape)


def _recorded(
    contents: Contents, selector: Any, num_rows: int, num_carried: int
) -> Bool[np.ndarray, " T"]:
    if selector == "all" and num_carried == num_rows:
        return np.ones(num_rows, bool)
    if selector == "suffix" and num_carried < num_rows:
        recorded = np.ones(num_rows, bool)
        recorded[: num_rows - num_carried] = False
        return recorded
    if selector == "bitmap" and num_carried < num_rows:
        bitmap = tensor(contents, "recorded", "U8", (-(-num_rows // 8),))
        recorded = np.unpackbits(bitmap, bitorder="little").view(bool)
        if np.count_nonzero(recorded) == np.count_nonzero(recorded[:num_rows]) == num_carried:
            return recorded[:num_rows]
    raise RoutingSchemaError(
        f"selector is {reprlib.repr(selector)} with {num_carried} of {num_rows} rows carried, "
        f"expected all of them, or fewer by suffix or bitmap: {FOREIGN}."
    )


def _reasons(contents: Contents, num_unrecorded: int) -> UInt8[np.ndarray, " n"]:
    shape = contents.tensors.get("status", ({}, None))[0].get("shape")
    reasons = tensor(contents, "status", "U8", (1,) if shape == [1] else (num_unrecorded,))
    reasons = check_status(reasons, len(reasons))
    if not reasons.all():
        raise RoutingSchemaError(
            f"status calls a row that is not carried {RowStatus.RECORDED.name}, expected the "
            f"reason: {FOREIGN}."
        )
    return reasons
