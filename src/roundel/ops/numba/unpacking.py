"""32-bit words -> codes in numba, the way back of packing.py. Bit-equal to `ops.bits.unpack_stream`, turned."""

from __future__ import annotations

import numpy as np

from roundel.ops.numba.compiling import jit

__all__ = ["unpack_columns"]

_TILE = 16  # columns of words that fill a cache line
_UNITS = 16  # of 32 codes, unpacked at a time


@jit
def _spread(octet, bits):  # type: ignore[no-untyped-def]
    """8 * bits bits -> eight codes in eight bytes."""
    b = np.uint64(bits)
    b4 = b * np.uint64(4)
    low = (np.uint64(1) << b4) - np.uint64(1)
    octet = (octet & low) | ((octet >> b4) & low) << np.uint64(32)
    b2 = b * np.uint64(2)
    low = ((np.uint64(1) << b2) - np.uint64(1)) * np.uint64(0x0000000100000001)
    octet = (octet & low) | ((octet >> b2) & low) << np.uint64(16)
    low = ((np.uint64(1) << b) - np.uint64(1)) * np.uint64(0x0001000100010001)
    return (octet & low) | ((octet >> b) & low) << np.uint64(8)


@jit
def _unpack_row(stream, bits, out):  # type: ignore[no-untyped-def]
    """Part of a row's words -> its codes, eight to an octet. Words are read up to two beyond the end."""
    count = out.shape[0]
    if bits == 4:
        for k in range(count):
            out[k] = _spread(np.uint64(stream[k]), 4)
    elif bits == 8:
        for k in range(count):
            out[k] = np.uint64(stream[2 * k]) | np.uint64(stream[2 * k + 1]) << np.uint64(32)
    elif bits == 2:
        for k in range(count // 2):
            out[2 * k] = _spread(np.uint64(stream[k] & np.uint32(0xFFFF)), 2)
            out[2 * k + 1] = _spread(np.uint64(stream[k] >> np.uint32(16)), 2)
    else:
        mask = ~np.uint64(0) >> np.uint64(64 - 8 * bits)
        for k in range(count):
            at, shift = k * 8 * bits // 32, np.uint64(k * 8 * bits % 32)
            value = (np.uint64(stream[at]) | np.uint64(stream[at + 1]) << np.uint64(32)) >> shift
            if shift + np.uint64(8 * bits) > np.uint64(64):
                value |= np.uint64(stream[at + 2]) << (np.uint64(64) - shift)
            out[k] = _spread(value & mask, bits)


@jit
def unpack_columns(words, bits, octets, first):  # type: ignore[no-untyped-def]
    """Columns of words -> rows of codes: the word words[k, first + row] is the k-th of the row's stream.

    words    [in * bits / 32, all rows] uint32
    octets   [rows, in / 8] uint64, filled: eight unsigned codes a byte each; in divisible by 32
    """
    rows, count = octets.shape
    units = count // 4
    held = np.zeros((_TILE, bits * _UNITS + 3), np.uint32)  # rows of words; not a power of two apart, for the cache
    for begin in range(0, rows, _TILE):
        width = min(_TILE, rows - begin)
        for left in range(0, units, _UNITS):
            here = min(_UNITS, units - left)
            for k in range(here * bits):
                line = words[left * bits + k, first + begin : first + begin + width]
                for row in range(width):
                    held[row, k] = line[row]
            for row in range(width):
                _unpack_row(held[row], bits, octets[begin + row, 4 * left : 4 * (left + here)])
