"""Packing codes into 32-bit words in numba. Bit-equal to `ops.bits` after the transposition each order asks for.

Eight codes of n bits become 8 n bits by three halving steps on a 64-bit register; four such octets make n whole words.
"""

from __future__ import annotations

import numpy as np

from roundel.ops.numba.compiling import jit

__all__ = ["pack_awq_columns", "pack_columns", "pack_nibbles"]

_TILE = 16  # rows whose words fill one cache line of the transposed output
_OCTETS = 64  # of a row, packed at a time


@jit
def _squeeze(octet, bits):  # type: ignore[no-untyped-def]
    """Eight codes in eight bytes -> 8 * bits bits."""
    b = np.uint64(bits)
    low = (np.uint64(1) << b) - np.uint64(1)
    pair = np.uint64(0x0001000100010001) * low
    octet = (octet & pair) | ((octet >> np.uint64(8)) & pair) << b
    b2 = b + b
    low = (np.uint64(1) << b2) - np.uint64(1)
    pair = np.uint64(0x0000000100000001) * low
    octet = (octet & pair) | ((octet >> np.uint64(16)) & pair) << b2
    b4 = b2 + b2
    low = np.uint64(0xFFFFFFFF) if b4 == np.uint64(32) else (np.uint64(1) << b4) - np.uint64(1)
    return (octet & low) | ((octet >> np.uint64(32)) & low) << b4


@jit
def _pack_row(octets, bits, packed):  # type: ignore[no-untyped-def]
    """Part of a row of codes -> its words."""
    count = octets.shape[0]
    if bits == 4:
        for k in range(count):
            packed[k] = np.uint32(_squeeze(octets[k], 4))
    elif bits == 8:
        for k in range(count):
            packed[2 * k] = np.uint32(octets[k])
            packed[2 * k + 1] = np.uint32(octets[k] >> np.uint64(32))
    elif bits == 2:
        for k in range(count // 2):
            packed[k] = np.uint32(_squeeze(octets[2 * k], 2) | _squeeze(octets[2 * k + 1], 2) << np.uint64(16))
    elif bits == 3:
        for k in range(count // 4):
            a, b = _squeeze(octets[4 * k], 3), _squeeze(octets[4 * k + 1], 3)
            c, d = _squeeze(octets[4 * k + 2], 3), _squeeze(octets[4 * k + 3], 3)
            packed[3 * k] = np.uint32((a | b << np.uint64(24)) & np.uint64(0xFFFFFFFF))
            packed[3 * k + 1] = np.uint32((b >> np.uint64(8) | c << np.uint64(16)) & np.uint64(0xFFFFFFFF))
            packed[3 * k + 2] = np.uint32(c >> np.uint64(16) | d << np.uint64(8))
    else:
        for k in range(0, count, 4):
            held = np.uint64(0)  # bits not yet written, lowest first
            filled = 0
            at = k // 4 * bits
            for j in range(4):
                octet = _squeeze(octets[k + j], bits)
                held |= octet << np.uint64(filled)
                taken = min(64 - filled, 8 * bits)
                filled += taken
                while filled >= 32:
                    packed[at] = np.uint32(held & np.uint64(0xFFFFFFFF))
                    at += 1
                    held >>= np.uint64(32)
                    filled -= 32
                if taken < 8 * bits:
                    held |= (octet >> np.uint64(taken)) << np.uint64(filled)
                    filled += 8 * bits - taken


@jit
def _transpose(tile, words, top, left, height, width):  # type: ignore[no-untyped-def]
    """words[top + k, left + row] = tile[row, k]. Whole blocks have constant bounds, which the compiler unrolls."""
    whole = height // _TILE * _TILE if width == _TILE else 0
    for k in range(0, whole, _TILE):
        block = tile[:, k : k + _TILE]
        for i in range(_TILE):
            line = words[top + k + i, left : left + _TILE]
            for row in range(_TILE):
                line[row] = block[row, i]
    for k in range(whole, height):
        for row in range(width):
            words[top + k, left + row] = tile[row, k]


@jit
def pack_columns(octets, bits, words, first):  # type: ignore[no-untyped-def]
    """Rows of codes -> columns of words: words[k, first + row] holds the row's k-th word (GPTQ's order).

    octets   [rows, in / 8] uint64: eight unsigned codes a byte each; in divisible by 32
    words    [in * bits / 32, all rows] uint32, filled at columns first .. first + rows

    Sixteen rows by 64 octets are packed into a tile first and turned from there: rows of `octets` and of `words` lie a
    power of two apart too often for the cache.
    """
    rows, count = octets.shape
    tile = np.empty((_TILE, _OCTETS * bits // 4 + _TILE), dtype=np.uint32)
    for begin in range(0, rows, _TILE):
        stop = min(begin + _TILE, rows)
        for left in range(0, count, _OCTETS):
            right = min(left + _OCTETS, count)
            for row in range(begin, stop):
                _pack_row(octets[row, left:right], bits, tile[row - begin])
            _transpose(tile, words, left * bits // 4, first + begin, (right - left) * bits // 4, stop - begin)


@jit
def pack_awq_columns(codes, words, first):  # type: ignore[no-untyped-def]
    """Rows of 4-bit codes -> words[column, (first + row) / 8], eight rows a word in AWQ's interleaved order.

    codes    [rows, in] uint8, rows divisible by 8
    words    [in, all rows / 8] uint32
    """
    rows, width = codes.shape
    for tile in range(0, rows, 8 * _TILE):
        stop = min(tile + 8 * _TILE, rows)
        for left in range(0, width, 64):
            right = min(left + 64, width)
            for row in range(tile, stop, 8):
                at = (first + row) // 8
                for column in range(left, right):
                    words[column, at] = (
                        np.uint32(codes[row, column])
                        | np.uint32(codes[row + 2, column]) << np.uint32(4)
                        | np.uint32(codes[row + 4, column]) << np.uint32(8)
                        | np.uint32(codes[row + 6, column]) << np.uint32(12)
                        | np.uint32(codes[row + 1, column]) << np.uint32(16)
                        | np.uint32(codes[row + 3, column]) << np.uint32(20)
                        | np.uint32(codes[row + 5, column]) << np.uint32(24)
                        | np.uint32(codes[row + 7, column]) << np.uint32(28)
                    )


@jit
def pack_nibbles(codes, packed):  # type: ignore[no-untyped-def]
    """[rows, in] 4-bit codes -> [rows, in / 2] bytes, the even column in the low nibble (MXFP4, NVFP4)."""
    rows, half = packed.shape
    for row in range(rows):
        for i in range(half):
            packed[row, i] = codes[row, 2 * i] | (codes[row, 2 * i + 1] << np.uint8(4))
