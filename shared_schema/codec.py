"""Routed experts as bytes for HTTP and disk; ``FORMAT.md`` specifies them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xxhash

from shared_schema.errors import RoutingSchemaError
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts

FORMAT_MAJOR = 1
MAX_HEADER_BYTES = 1 << 20
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "U16": np.dtype("<u2")}
_LENGTH_BYTES = 8
_FOREIGN = "it is not a moe-r3 payload"
_ALTERED = "it was cut off or altered, fetch it again"


def encode(routed: RoutedExperts) -> bytes:
    """Write a safetensors file of raw ids with checksum; :func:`decode` is the inverse."""
    fields = {
        "version": FORMAT_MAJOR,
        **routed.layout.to_dict(),
        "token_start": routed.token_start,
        "spans": [list(span) for span in routed.spans],
    }
    planes = {"ids": np.ascontiguousarray(routed.ids.astype(_wire_dtype(routed.layout)))}
    if not routed.is_complete:
        planes["status"] = np.ascontiguousarray(routed._status)
    meta = json.dumps(fields, separators=(",", ":"))
    header: dict[str, Any] = {}
    end = 0
    for name, plane in planes.items():
        begin, end = end, end + plane.nbytes
        dtype = "U8" if plane.dtype.itemsize == 1 else "U16"
        header[name] = {"dtype": dtype, "shape": plane.shape, "data_offsets": [begin, end]}
    buffers = [plane.data.cast("B") if plane.size else b"" for plane in planes.values()]
    header["__metadata__"] = {"moe_r3": meta, "xxh3_64": _checksum(meta, *buffers)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise RoutingSchemaError(
            f"the header has {len(text)} bytes, expected at most {MAX_HEADER_BYTES}: "
            f"merge some of the {len(routed.spans)} spans."
        )
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *buffers])


def decode(
    payload: bytes | bytearray | memoryview, expect: RoutingLayout | None = None
) -> RoutedExperts:
    """Read what :func:`encode` wrote; ids are a view into ``payload``, not a copy.

    Args:
        payload: the bytes, or a buffer such as a memory-mapped file.
        expect: the layout of the model at hand; a payload of another model is refused.

    Raises:
        RoutingSchemaError: whatever is wrong with the payload; nothing is executed, and nothing
            larger than the payload is allocated before it is known to be whole.

    """
    view = memoryview(payload).cast("B")
    header, data = _split(view)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("moe_r3"), str):
        raise RoutingSchemaError(
            f"the payload's header has no moe_r3 metadata, expected one: {_FOREIGN}."
        )
    fields = _parse_json(metadata["moe_r3"], "the moe_r3 metadata")
    version = fields.get("version")
    if version != FORMAT_MAJOR:
        raise RoutingSchemaError(
            f"the payload has format version {version!r}, expected {FORMAT_MAJOR}: "
            "read it with a newer moe-r3."
        )
    planes = _planes(header, data)
    stored, seen = metadata.get("xxh3_64"), _checksum(metadata["moe_r3"], data)
    if stored != seen:
        raise RoutingSchemaError(
            f"the payload's checksum is {seen}, expected {stored}: it was altered, fetch it again."
        )
    layout = RoutingLayout.from_dict(fields)
    if expect is not None:
        expect.require_same(layout, "the payload")
    if "ids" not in planes or planes["ids"].dtype != _wire_dtype(layout):
        raise RoutingSchemaError(
            f"the payload has tensors {sorted(planes)}, expected ids in {layout.dtype} for "
            f"{layout.num_experts} experts: {_FOREIGN}."
        )
    spans = fields.get("spans", ())
    if not isinstance(spans, list):
        raise RoutingSchemaError(f"spans is {spans!r}, expected a list: {_FOREIGN}.")
    return RoutedExperts(
        planes["ids"],
        layout,
        fields.get("token_start", 0),
        planes.get("status"),
        tuple(spans),
    )


def _split(view: memoryview) -> tuple[dict[str, Any], memoryview]:
    if len(view) < _LENGTH_BYTES:
        raise RoutingSchemaError(
            f"the payload has {len(view)} bytes, expected at least {_LENGTH_BYTES}: {_ALTERED}."
        )
    length = int.from_bytes(view[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise RoutingSchemaError(
            f"the payload declares a header of {length} bytes, expected at most "
            f"{MAX_HEADER_BYTES}: {_FOREIGN}."
        )
    if _LENGTH_BYTES + length > len(view):
        raise RoutingSchemaError(
            f"the payload has {len(view)} bytes, expected {_LENGTH_BYTES + length} for its header "
            f"alone: {_ALTERED}."
        )
    text = bytes(view[_LENGTH_BYTES : _LENGTH_BYTES + length])
    return _parse_json(text, "the payload's header"), view[_LENGTH_BYTES + length :]


def _parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RoutingSchemaError(f"{what} is not JSON ({error}): {_FOREIGN}.") from None
    if not isinstance(value, dict):
        raise RoutingSchemaError(f"{what} is a {type(value).__name__}, expected an object.")
    return value


def _planes(header: dict[str, Any], data: memoryview) -> dict[str, np.ndarray[Any, Any]]:
    """Views of the tensors; they must fill the data section without hole or overlap."""
    planes = {}
    position = 0
    try:
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            dtype = _DTYPES[entry["dtype"]]
            shape = [int(n) for n in entry["shape"]]
            begin, end = (int(n) for n in entry["data_offsets"])
            size = dtype.itemsize
            for n in shape:
                size *= n
            if begin != position or end - begin != size or min(shape, default=0) < 0:
                raise ValueError(f"tensor {name} lies at {begin}:{end} for {size} bytes")
            if end > len(data):
                raise RoutingSchemaError(
                    f"the payload holds {len(data)} bytes of data, expected {end} for {name}: "
                    f"{_ALTERED}."
                )
            planes[name] = np.frombuffer(data[begin:end], dtype).reshape(shape)
            position = end
    except RoutingSchemaError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RoutingSchemaError(
            f"the payload's tensors are malformed ({error!r}), expected safetensors entries of "
            f"type {' or '.join(_DTYPES)}: {_FOREIGN}."
        ) from None
    if position != len(data):
        raise RoutingSchemaError(
            f"the payload holds {len(data)} bytes of data, expected {position}: {_ALTERED}."
        )
    return planes


def _checksum(meta: str, *buffers: bytes | memoryview) -> str:
    digest = xxhash.xxh3_64(meta.encode("utf-8", "surrogatepass"))
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()


def _wire_dtype(layout: RoutingLayout) -> np.dtype[Any]:
    return layout.dtype.newbyteorder("<")
