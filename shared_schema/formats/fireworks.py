"""Fireworks' R3V1: base64 of one zstd frame of header, selector and routing matrices.

The header has 32 bytes, little-endian ``4sBBBBIIIIQ``: magic ``R3V1``, version 1, selector mode,
dtype (1 uint8, 2 uint16), flags, number of tokens, number of tokens with a matrix, first such
token, bytes of the selector, bytes of the matrices. The selector says which tokens have a matrix:
ALL (0), a SUFFIX (1) from the first, or a BITMAP (2) with a bit for each token, lowest bit first.
A matrix holds the ids ``[MoE layers, k]`` of one position of the model's input.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from shared_schema.codec import MAX_DECODED_BYTES
from shared_schema.errors import RoutingSchemaError
from shared_schema.formats.arrays import Layers, from_array, to_array
from shared_schema.formats.base64_text import from_base64, integers_of, to_base64
from shared_schema.layout import RoutingLayout
from shared_schema.routed_experts import RoutedExperts, RowStatus

_HEADER = struct.Struct("<4sBBBBIIIIQ")
_MAGIC = b"R3V1"
_VERSION = 1
_PIECE = 1 << 20
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2")}


class _Selector(IntEnum):
    ALL = 0
    SUFFIX = 1
    BITMAP = 2


def from_fireworks(
    data: Any,
    layout: RoutingLayout,
    token_start: int | None = None,
    *,
    layers: Layers | None = None,
) -> RoutedExperts:
    """Read base64 text, or the zstd frame as bytes.

    ALL and SUFFIX give the rows that are carried. BITMAP gives a row for each of the payload's
    tokens, ``MISSING`` where it has no matrix.

    Args:
        data: the text or the frame.
        layout: the model's layout.
        token_start: position of the first row; the payload says it, so it can only agree.
        layers: what the layer axis means; ``None`` takes what its length fits.

    Raises:
        RoutingSchemaError: not such a payload, or rows that break the schema.

    """
    raw = _decompress(data if isinstance(data, bytes) else from_base64(data), layout)
    _, _, mode, dtype_code, _, tokens, carried, first, selector_size, matrix_size = (
        _HEADER.unpack_from(raw)
    )
    dtype = _DTYPES[dtype_code]
    selector = raw[_HEADER.size : _HEADER.size + selector_size]
    row_size = layout.top_k * dtype.itemsize
    num_layers = matrix_size // (carried * row_size) if carried else layout.num_moe_layers
    ids = integers_of(
        memoryview(raw)[_HEADER.size + selector_size :], dtype, (carried, num_layers, layout.top_k)
    )
    start, stop = {
        _Selector.ALL: (0, tokens),
        _Selector.SUFFIX: (first, first + carried),
        _Selector.BITMAP: (0, tokens),
    }[_Selector(mode)]
    if token_start not in (None, start):
        raise RoutingSchemaError(
            f"token_start is {token_start}, expected {start} as the payload says: leave it out."
        )
    if mode != _Selector.BITMAP:
        if stop - start != carried or stop > tokens:
            raise RoutingSchemaError(
                f"the payload has {carried} matrices for positions {start} … {stop} of {tokens} "
                "tokens, expected one for each: it was altered, fetch it again."
            )
        return from_array(ids, layout, start, layers=layers)
    present = _bits(selector, tokens)
    if int(present.sum()) != carried:
        raise RoutingSchemaError(
            f"the payload's bitmap selects {int(present.sum())} tokens, expected {carried} as its "
            "header says: it was altered, fetch it again."
        )
    rows = np.zeros((tokens, *ids.shape[1:]), dtype)
    rows[present] = ids
    status = np.where(present, RowStatus.RECORDED, RowStatus.MISSING).astype(np.uint8)
    return from_array(rows, layout, 0, layers=layers, status=status)


def to_fireworks(routed: RoutedExperts) -> str:
    """Write base64 text: ALL from position 0, SUFFIX from a later one, BITMAP with gaps.

    Raises:
        RoutingSchemaError: zstandard is not installed.

    """
    recorded = routed.recorded
    ids = to_array(routed, layers="moe", unrecorded=0)[recorded]
    selector, first = b"", 0
    if not routed.is_complete:
        mode = _Selector.BITMAP
        present = np.concatenate([np.zeros(routed.token_start, bool), recorded])
        selector = np.packbits(present, bitorder="little").tobytes()
        first = int(present.argmax())
    else:
        first = routed.token_start
        mode = _Selector.SUFFIX if first else _Selector.ALL
    dtype_code = ids.dtype.itemsize
    matrices = np.ascontiguousarray(ids, _DTYPES[dtype_code]).tobytes()
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        mode,
        dtype_code,
        0,
        routed.token_stop,
        len(ids),
        first,
        len(selector),
        len(matrices),
    )
    return to_base64(_zstandard().ZstdCompressor().compress(header + selector + matrices))


def _decompress(frame: bytes, layout: RoutingLayout) -> bytes:
    """Header and body, no longer than the header declares and this model allows."""
    zstandard = _zstandard()
    try:
        with zstandard.ZstdDecompressor().stream_reader(frame) as reader:
            header = reader.read(_HEADER.size)
            size = _checked_size(header, layout)
            # In pieces: memory grows with what is there, not with what the header declares.
            pieces = [header]
            while len(pieces[-1]) and len(pieces) * _PIECE <= size + 2 * _PIECE:
                pieces.append(reader.read(_PIECE))
    except zstandard.ZstdError as error:
        raise RoutingSchemaError(
            f"{len(frame)} bytes are not a zstd frame ({error}), expected one: they were cut off "
            "or altered, fetch them again."
        ) from None
    raw = b"".join(pieces)
    if len(raw) != _HEADER.size + size:
        raise RoutingSchemaError(
            f"the payload unpacks to {len(raw)} bytes or more, expected {_HEADER.size + size} as "
            "its header says: it was cut off or altered, fetch it again."
        )
    return raw


def _checked_size(header: bytes, layout: RoutingLayout) -> int:
    """Bytes after the header, once they are known to fit this model."""
    if len(header) < _HEADER.size or header[:4] != _MAGIC:
        raise RoutingSchemaError(
            f"the payload begins with {header[:4]!r}, expected {_MAGIC!r} and a header of "
            f"{_HEADER.size} bytes: check that it is Fireworks' R3V1."
        )
    _, version, mode, dtype_code, _, tokens, carried, _, selector_size, matrix_size = (
        _HEADER.unpack(header)
    )
    if version != _VERSION or mode not in list(_Selector) or dtype_code not in _DTYPES:
        raise RoutingSchemaError(
            f"the payload has version {version}, selector {mode}, dtype {dtype_code}, expected "
            f"version {_VERSION}, selector 0 … 2, dtype 1 or 2: it was written by a newer version."
        )
    row_size = layout.top_k * _DTYPES[dtype_code].itemsize
    sizes = {carried * n * row_size for n in (layout.num_moe_layers, layout.num_hidden_layers)}
    bitmap_size = (tokens + 7) // 8
    selector_sizes = {bitmap_size} if mode == _Selector.BITMAP else {0, bitmap_size}
    decoded = max(tokens, carried) * layout.num_hidden_layers * row_size
    if (
        decoded > MAX_DECODED_BYTES
        or selector_size not in selector_sizes
        or matrix_size not in sizes
    ):
        raise RoutingSchemaError(
            f"the payload declares {tokens} tokens, {carried} matrices in {matrix_size} bytes and "
            f"a selector of {selector_size} bytes, {decoded} bytes of rows in all, expected "
            f"{' or '.join(str(s) for s in sorted(sizes))} bytes of matrices and at most "
            f"{MAX_DECODED_BYTES} of rows: it was altered, or comes from another model."
        )
    return int(selector_size + matrix_size)


def _bits(selector: bytes, tokens: int) -> Bool[np.ndarray, " T"]:
    bits: UInt8[np.ndarray, " T"] = np.unpackbits(
        np.frombuffer(selector, np.uint8), bitorder="little"
    )
    if bits[tokens:].any():
        raise RoutingSchemaError(
            f"the payload's bitmap selects tokens beyond its {tokens}, expected none: it was "
            "altered, fetch it again."
        )
    return bits[:tokens].astype(bool)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise RoutingSchemaError(
            "zstandard is not installed, expected it for Fireworks' format: "
            "pip install 'moe-r3[fireworks]'."
        ) from None
    return zstandard
