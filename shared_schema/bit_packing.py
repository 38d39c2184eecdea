"""Ids of ``bits`` bits each, one after the other without gaps, lowest bit first.

Id ``j`` occupies bits ``j * bits`` … ``(j + 1) * bits - 1`` of the stream, whose bit ``n`` is bit
``n % 8`` of byte ``n // 8``. Eight ids, a group, fill ``bits`` whole bytes.

Both directions work on 64-bit words, many at a time: neighbouring ids merge to pairs, pairs to
fours, fours to eights, in two to four operations on whole words each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt, UInt8, UInt64

_WORD = np.dtype("<u8")
_BLOCK_WORDS = 1 << 14
"""Words worked on at a time: with their scratch they stay in the L2 cache."""
_GUARD_GROUPS = 8
"""Groups at the end that are copied to a longer buffer, since words reach beyond a group."""


def bits_per_id(num_experts: int) -> int:
    """ceil(log2 E), at least 1."""
    return max(1, (num_experts - 1).bit_length())


def packed_nbytes(num_ids: int, bits: int) -> int:
    """Bytes of the stream of ``num_ids`` ids; unused bits of the last byte are zero."""
    return -(-num_ids * bits // 8)


def pack(ids: UInt[np.ndarray, " n"], bits: int, out: UInt8[np.ndarray, " nbytes"]) -> None:
    """Write ``ids`` to ``out``, which has :func:`packed_nbytes` bytes.

    Args:
        ids: contiguous, below ``2 ** bits``; uint8 for ``bits`` < 8, uint16 for 8 < ``bits`` < 16.
        bits: width of an id in the stream.
        out: contiguous and writable.

    """
    groups = max(0, len(ids) // 8 - _GUARD_GROUPS)
    _pack_groups(ids[: 8 * groups], bits, out)
    rest = ids[8 * groups :]
    whole = np.zeros(-(-len(rest) // 8) * 8, ids.dtype)
    whole[: len(rest)] = rest
    packed = np.empty(packed_nbytes(len(whole), bits) + _WORD.itemsize, np.uint8)
    _pack_groups(whole, bits, packed)
    tail = out[groups * bits :]
    tail[:] = packed[: len(tail)]


def unpack(packed: UInt8[np.ndarray, " nbytes"], bits: int, num_ids: int) -> UInt[np.ndarray, " n"]:
    """Read ``num_ids`` ids from :func:`packed_nbytes` bytes; the inverse of :func:`pack`."""
    ids = np.empty(num_ids, np.uint8 if bits < 8 else "<u2")
    groups = max(0, num_ids // 8 - _GUARD_GROUPS)
    _unpack_groups(packed, bits, ids[: 8 * groups])
    rest = ids[8 * groups :]
    whole = np.empty(-(-len(rest) // 8) * 8, ids.dtype)
    tail = np.zeros(packed_nbytes(len(whole), bits) + _WORD.itemsize, np.uint8)
    tail[: len(packed) - groups * bits] = packed[groups * bits :]
    _unpack_groups(tail, bits, whole)
    rest[:] = whole[: len(rest)]
    return ids


class _Merge(NamedTuple):
    """One halving of the number of lanes: the upper run of each pair moves down to the lower one.

    Constants are arrays without dimensions, which numpy takes faster than scalars.
    """

    shift: np.ndarray
    low: np.ndarray
    """The lower runs."""
    high: np.ndarray
    """The upper runs, moved."""
    factor: np.ndarray
    """2 ** shift - 1: h + h * factor is h moved up again."""


def _merges(bits: int, lane: int) -> list[_Merge]:
    """From runs of ``bits`` bits in lanes of ``lane`` bits to one run in each word."""
    merges = []
    while lane < 64:
        low = sum(((1 << bits) - 1) << at for at in range(0, 64, 2 * lane))
        numbers = (lane - bits, low, low << bits, (1 << (lane - bits)) - 1)
        merges.append(_Merge(*(_constant(number) for number in numbers)))
        lane, bits = 2 * lane, 2 * bits
    return merges


def _pack_groups(ids: UInt[np.ndarray, " n"], bits: int, out: UInt8[np.ndarray, " m"]) -> None:
    """Pack whole groups; up to 7 bytes of ``out`` after the last are overwritten."""
    merges = _merges(bits, 8 * ids.itemsize)
    store = _pack_narrow if ids.itemsize == 1 else _pack_wide
    position = 0
    for words, x, t in _blocks(ids):
        if ids.itemsize == 2:  # the two words of a group side by side, so that both are contiguous
            np.copyto(x[: len(x) // 2], words[0::2])
            np.copyto(x[len(x) // 2 :], words[1::2])
            words = x
        for shift, low, high, factor in merges:
            np.right_shift(words, shift, out=t)
            np.bitwise_and(t, high, out=t)
            if factor == 1:  # a run moved down by one bit is its own half
                np.subtract(words, t, out=x)
            else:
                np.bitwise_and(words, low, out=x)
                np.bitwise_or(x, t, out=x)
            words = x
        position += store(x, t, bits, out, position)


def _pack_narrow(
    x: UInt64[np.ndarray, " w"], t: UInt64[np.ndarray, " w"], bits: int, out: np.ndarray, at: int
) -> int:
    """Store words of one group each, ``8 * bits`` bits, and return the bytes taken.

    Stores overlap; each holds the beginning of the next group too, so that their order is free.
    """
    np.left_shift(x[1:], _constant(8 * bits), out=t[:-1])
    np.bitwise_or(x[:-1], t[:-1], out=x[:-1])
    size = 1 << (bits - 1).bit_length()
    np.copyto(_words_at(out, at, len(x), bits, f"<u{size}"), x, casting="unsafe")
    return len(x) * bits


def _pack_wide(
    x: UInt64[np.ndarray, " w"], t: UInt64[np.ndarray, " w"], bits: int, out: np.ndarray, at: int
) -> int:
    """Store groups of two words, ``4 * bits`` bits each, as their first and last 8 bytes."""
    groups = len(x) // 2
    first, second, a, b = x[:groups], x[groups:], t[:groups], t[groups:]
    np.left_shift(second, _constant(4 * bits), out=a)
    np.bitwise_or(first, a, out=a)
    np.copyto(_words_at(out, at, groups, bits), a)
    np.left_shift(second, _constant(64 - 4 * bits), out=a)
    np.right_shift(first, _constant(8 * bits - 64), out=b)
    np.bitwise_or(a, b, out=a)
    np.copyto(_words_at(out, at + bits - 8, groups, bits), a)
    return groups * bits


def _unpack_groups(packed: UInt8[np.ndarray, " m"], bits: int, ids: UInt[np.ndarray, " n"]) -> None:
    """Unpack whole groups; up to 7 bytes of ``packed`` after the last are read."""
    *merges, last = _merges(bits, 8 * ids.itemsize)[::-1]
    run = _constant((1 << bits * 8 // ids.itemsize) - 1)
    position = 0
    for words, x, t in _blocks(ids):
        groups = len(x) // ids.itemsize
        np.bitwise_and(_words_at(packed, position, groups, bits), run, out=x[:groups])
        if ids.itemsize == 2:
            ends = _words_at(packed, position + bits - 8, groups, bits)
            np.right_shift(ends, _constant(64 - 4 * bits), out=x[groups:])
        for merge in merges:
            np.bitwise_and(x, merge.high, out=t)
            np.multiply(t, merge.factor, out=t)
            np.add(x, t, out=x)
        np.bitwise_and(x, last.high, out=t)
        if last.factor > 1:
            np.multiply(t, last.factor, out=t)
        if ids.itemsize == 1:
            np.add(x, t, out=words)
        else:
            np.add(x[:groups], t[:groups], out=words[0::2])
            np.add(x[groups:], t[groups:], out=words[1::2])
        position += groups * bits


def _constant(number: int) -> np.ndarray:
    return np.array(number, np.uint64)


def _blocks(
    ids: UInt[np.ndarray, " n"],
) -> Iterator[tuple[UInt64[np.ndarray, " w"], UInt64[np.ndarray, " w"], UInt64[np.ndarray, " w"]]]:
    """The ids of whole groups as words, a block at a time, with two scratch arrays as long."""
    words = ids.view(_WORD)
    x, t = np.empty((2, min(len(words), _BLOCK_WORDS)), np.uint64)
    for first in range(0, len(words), _BLOCK_WORDS):
        block = words[first : first + _BLOCK_WORDS]
        yield block, x[: len(block)], t[: len(block)]


def _words_at(
    buffer: np.ndarray, offset: int, count: int, stride: int, dtype: str = "<u8"
) -> np.ndarray:
    """``count`` words of ``buffer``, from byte ``offset`` and ``stride`` bytes apart."""
    return np.ndarray((count,), dtype, buffer, offset, (stride,))
