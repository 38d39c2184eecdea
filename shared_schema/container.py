"""The outside of a payload: a safetensors file, its version, its checksum and its limits."""

from __future__ import annotations

import io
import json
import math
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import UInt8

from shared_schema.errors import RoutingSchemaError

FORMAT_MAJOR = 1
MAX_HEADER_BYTES = 1 << 20
MAX_INTEGER = (1 << 53) - 1
"""JSON readers that hold numbers as float64 know larger ones only roughly."""
FOREIGN = "it is not a moe-r3 payload"
ALTERED = "it was cut off or altered, fetch it again"
_LENGTH_BYTES = 8
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "U16": np.dtype("<u2")}


class Plane(NamedTuple):
    """A tensor to be written; ``fill`` gets its bytes in the payload."""

    dtype: str
    shape: tuple[int, ...]
    fill: Callable[[UInt8[np.ndarray, " nbytes"]], None]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


class Contents(NamedTuple):
    """What a payload holds: the fields of its metadata, and its tensors' entries and bytes."""

    fields: dict[str, Any]
    tensors: dict[str, tuple[dict[str, Any], memoryview]]


def write(fields: dict[str, Any], planes: dict[str, Plane]) -> bytes:
    """Lay out ``planes`` in their order behind a header with ``fields``.

    Raises:
        RoutingSchemaError: the header would exceed its limit.

    """
    meta = json.dumps({"version": FORMAT_MAJOR, **fields}, separators=(",", ":"))
    head = _header(meta, planes, checksum="0" * 16)
    begin = len(head)
    # BytesIO hands its buffer out as bytes without a copy.
    file = io.BytesIO(bytes(begin + sum(plane.nbytes for plane in planes.values())))
    with file.getbuffer() as buffer:
        payload = np.frombuffer(buffer, np.uint8)
        end = begin
        for plane in planes.values():
            position, end = end, end + plane.nbytes
            plane.fill(payload[position:end])
        checksum = _checksum(meta, payload[begin:].data)
        payload[:begin] = np.frombuffer(_header(meta, planes, checksum), np.uint8)
        del payload
    return file.getvalue()


def read(payload: bytes | bytearray | memoryview) -> Contents:
    """Split a payload, check its version and its checksum, and look no further.

    Raises:
        RoutingSchemaError: whatever is wrong with it.

    """
    try:
        view = memoryview(payload).cast("B")
    except TypeError:
        raise RoutingSchemaError(
            f"the payload is a {type(payload).__name__}, expected bytes or a contiguous buffer of "
            "them: text that came in JSON is base64, decode that first."
        ) from None
    header, data = _split(view)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("moe_r3"), str):
        raise RoutingSchemaError(
            f"the payload's header has no moe_r3 metadata, expected one: {FOREIGN}."
        )
    meta = metadata["moe_r3"]
    fields = _parse_json(meta, "the moe_r3 metadata")
    version = fields.get("version")
    if type(version) is not int or version != FORMAT_MAJOR:
        raise RoutingSchemaError(
            f"the payload has format version {reprlib.repr(version)}, expected {FORMAT_MAJOR}: "
            "read it with a newer moe-r3."
        )
    stored, seen = metadata.get("xxh3_64"), _checksum(meta, data)
    if stored != seen:
        raise RoutingSchemaError(
            f"the payload's checksum is {seen}, expected {reprlib.repr(stored)}: {ALTERED}."
        )
    return Contents(fields, _tensors(header, data))


def integer(fields: dict[str, Any], name: str) -> int:
    """Return the field ``name`` if it is an integer from 0 to ``MAX_INTEGER``, or raise."""
    value = fields.get(name)
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise RoutingSchemaError(
            f"{name} is {reprlib.repr(value)}, expected an integer from 0 to {MAX_INTEGER}: "
            f"{FOREIGN}."
        )
    return value


def tensor(
    contents: Contents, name: str, dtype: str, shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """Return the tensor ``name`` as a view if it has this type and shape, or raise."""
    entry, data = contents.tensors.get(name, ({}, memoryview(b"")))
    if entry.get("dtype") != dtype or entry.get("shape") != list(shape):
        described = reprlib.repr([entry.get("dtype"), entry.get("shape")]) if entry else "absent"
        raise RoutingSchemaError(
            f"the tensor {name} is {described}, expected {[dtype, list(shape)]}: {FOREIGN}."
        )
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if len(data) != nbytes:
        raise RoutingSchemaError(
            f"the tensor {name} has {len(data)} bytes, expected {nbytes}: {ALTERED}."
        )
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _header(meta: str, planes: dict[str, Plane], checksum: str) -> bytes:
    header: dict[str, Any] = {}
    end = 0
    for name, plane in planes.items():
        begin, end = end, end + plane.nbytes
        header[name] = {"dtype": plane.dtype, "shape": plane.shape, "data_offsets": [begin, end]}
    header["__metadata__"] = {"moe_r3": meta, "xxh3_64": checksum}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise RoutingSchemaError(
            f"the header has {len(text)} bytes, expected at most {MAX_HEADER_BYTES}: "
            "merge some of the spans."
        )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _split(view: memoryview) -> tuple[dict[str, Any], memoryview]:
    if len(view) < _LENGTH_BYTES:
        raise RoutingSchemaError(
            f"the payload has {len(view)} bytes, expected at least {_LENGTH_BYTES}: {ALTERED}."
        )
    length = int.from_bytes(view[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise RoutingSchemaError(
            f"the payload declares a header of {length} bytes, expected at most "
            f"{MAX_HEADER_BYTES}: {FOREIGN}."
        )
    end = _LENGTH_BYTES + length
    if end > len(view):
        raise RoutingSchemaError(
            f"the payload has {len(view)} bytes, expected {end} for its header alone: {ALTERED}."
        )
    return _parse_json(bytes(view[_LENGTH_BYTES:end]), "the payload's header"), view[end:]


def _parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RoutingSchemaError(f"{what} is not JSON ({error}): {FOREIGN}.") from None
    if not isinstance(value, dict):
        raise RoutingSchemaError(
            f"{what} is a {type(value).__name__}, expected an object: {FOREIGN}."
        )
    return value


def _tensors(
    header: dict[str, Any], data: memoryview
) -> dict[str, tuple[dict[str, Any], memoryview]]:
    """The tensors' bytes; together they must fill the data without hole or overlap."""
    spans = []
    for name, entry in header.items():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (
            isinstance(offsets, list)
            and len(offsets) == 2
            and all(type(n) is int and 0 <= n <= MAX_INTEGER for n in offsets)
        ):
            raise RoutingSchemaError(
                f"the tensor {reprlib.repr(name)} is {reprlib.repr(entry)}, expected dtype, shape "
                f"and data_offsets: {FOREIGN}."
            )
        spans.append((*offsets, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position or end < begin:
            raise RoutingSchemaError(
                f"the tensor {reprlib.repr(name)} has data_offsets {[begin, end]}, expected them "
                f"to begin at {position}: {FOREIGN}."
            )
        position = end
    if position != len(data):
        raise RoutingSchemaError(
            f"the payload holds {len(data)} bytes of data, expected {position}: {ALTERED}."
        )
    return {name: (header[name], data[begin:end]) for begin, end, name in spans}


def _checksum(meta: str, data: memoryview) -> str:
    digest = xxhash.xxh3_64(meta.encode("utf-8", "surrogatepass"))
    digest.update(data)
    return digest.hexdigest()
