"""Stored bits of weights, as the kernels read them: their values, and the ends of a block's range.

The dtype of the bits says what they are (BF16, F16, F32 below). Among floats of one sign, order is the order of their
bits, so both ends of a block are found by integer maxima, sixteen bf16 at once.

How the text of a kernel is spelled decides whether the compiler uses vectors: numba widens every sum of integers to 64
bits unless it is cast back at once, wraps negative indices unless they are unsigned, and keeps floating sums in order
unless a function allows otherwise.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import overload

from roundel.ops.numba.compiling import jit

__all__ = [
    "BF16",
    "F16",
    "F32",
    "INFINITY",
    "add_square",
    "bits_of",
    "ends_of_blocks",
    "error_of",
    "first_infinite",
    "float_of",
    "value_of",
]

BF16, F16, F32 = np.uint16, np.int16, np.uint32  # the dtype under which the kernels take each kind's bits
INFINITY = np.float32(np.inf)


@jit
def bits_of(value):  # type: ignore[no-untyped-def]
    """The 32 bits of a float32."""
    return np.float32(value).view(np.uint32)


@jit
def float_of(bits):  # type: ignore[no-untyped-def]
    """The float32 of 32 bits."""
    return np.uint32(bits).view(np.float32)


def value_of(bits: np.generic) -> np.float32:
    """Stored bits -> float32; an fp16 that is not finite becomes an infinity."""
    raise NotImplementedError  # compiled only


@overload(value_of)
def _value_compiled(bits):  # type: ignore[no-untyped-def]
    if bits == types.uint16:
        return lambda bits: float_of(np.uint32(bits) << np.uint32(16))
    if bits == types.uint32:
        return lambda bits: float_of(bits)

    def from_half(bits):  # type: ignore[no-untyped-def]
        size = np.uint32(np.uint32(np.uint16(bits)) & np.uint32(0x7FFF))
        lifted = float_of(size << np.uint32(13))
        found = lifted * np.float32(5.192296858534828e33)  # 2^112: the difference of the biases
        found = INFINITY if size >= np.uint32(0x7C00) else found
        return -found if bits < np.int16(0) else found

    return from_half


def _ends(stored, row, begin, count):  # type: ignore[no-untyped-def]
    """(largest, most negative) of a block and zero, as bits."""
    raise NotImplementedError  # compiled only


@overload(_ends)
def _ends_compiled(stored, row, begin, count):  # type: ignore[no-untyped-def]
    signed, unsigned = (np.int32, np.uint32) if stored.dtype == types.uint32 else (np.int16, np.uint16)
    negative_zero = unsigned(1 << (8 * unsigned().itemsize - 1))

    def found(stored, row, begin, count):  # type: ignore[no-untyped-def]
        top, bottom = signed(0), negative_zero
        for i in range(count):
            rising = signed(stored[row, begin + np.uint64(i)])
            falling = unsigned(stored[row, begin + np.uint64(i)])
            top = rising if rising > top else top
            bottom = falling if falling > bottom else bottom
        return top, bottom

    return found


@jit
def ends_of_blocks(stored, row, group, tops, bottoms):  # type: ignore[no-untyped-def]
    """The ends of all blocks of a row, as bits."""
    width = stored.shape[1]
    for block in range(len(tops)):
        begin = np.uint64(block * group)
        tops[block], bottoms[block] = _ends(stored, row, begin, min(group, width - block * group))  # type: ignore[no-untyped-call]


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def add_square(total, value):  # type: ignore[no-untyped-def]
    """total + value^2; the compiler may add up in any order."""
    return total + value * value


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def error_of(value, code, scale):  # type: ignore[no-untyped-def]
    """value - code * scale, which may be fused: errors are told, not stored."""
    return value - code * scale


@jit
def first_infinite(scales):  # type: ignore[no-untyped-def]
    """The index of the first infinite scale of a row [blocks]; -1: none."""
    for block in range(len(scales)):
        if abs(scales[block]) == INFINITY:
            return block
    return -1
