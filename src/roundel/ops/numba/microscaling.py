"""Plain rounding to e2m1 and e4m3 with power-of-two scales in numba (the MX formats). Bit-equal to `ops.encode`.

A weight is scaled and added to 1.5 * 2^n, which rounds it to a multiple of 2^(n-23), half to even, and leaves that
multiple in the sum's low bits. With n as its octave asks, but no lower than the element's smallest normal octave, the
multiple is its significand, whether the element is normal or not.
"""

from __future__ import annotations

import numpy as np

from roundel.ops.numba.compiling import jit
from roundel.ops.numba.stored import (
    INFINITY,
    add_square,
    bits_of,
    ends_of_blocks,
    error_of,
    first_infinite,
    float_of,
    value_of,
)

__all__ = ["mx_parameters", "round_mx"]

INFINITY_BITS = np.uint32(0x7F800000)


def mx_parameters(element: str, largest: float) -> tuple[int, np.float32]:
    """(fraction bits, largest value) of e2m1 or e4m3, as `round_mx` takes them."""
    return (1 if element == "e2m1" else 3), np.float32(largest)


@jit
def _mx_scales(tops, bottoms, largest, scales, exponents, row):  # type: ignore[no-untyped-def]
    """Ends of blocks -> scales (infinite where a block is not finite) and the row of E8M0 exponents.

    The scale is 2^(floor(log2 of the largest magnitude) - that of the element's largest value); log2 of 0 counts as 1.
    """
    element = np.int32(np.int32(bits_of(largest) >> np.uint32(23)) - np.int32(127))
    for block in range(len(tops)):
        high, low = value_of(tops[block]), -value_of(bottoms[block])
        size = high if high > low else low
        is_normal = bits_of(size) >= np.uint32(0x00800000)
        lifted = bits_of(size if is_normal else size * np.float32(16777216.0))
        power = np.int32(np.int32(lifted >> np.uint32(23)) - (np.int32(127) if is_normal else np.int32(127 + 24)))
        power = np.int32((np.int32(1) if size == np.float32(0.0) else power) - element)
        power = power if power > np.int32(-127) else np.int32(-127)
        exponents[row, block] = np.uint8(power + np.int32(127))
        bits = np.uint32(np.uint32(power + np.int32(127)) << np.uint32(23))
        bits = bits if power > np.int32(-127) else np.uint32(0x00400000)  # 2^-127 is subnormal
        scales[block] = float_of(bits) if high < INFINITY and low < INFINITY else INFINITY


@jit
def _mx_codes(stored, row, mantissa, largest, scales, codes, sums):  # type: ignore[no-untyped-def]
    is_four = mantissa == 1
    smallest_normal = np.uint32(np.uint32(127 if is_four else 121) << np.uint32(23))  # 2^0 of e2m1, 2^-6 of e4m3
    shift = np.uint32(23 - mantissa)
    lift = np.uint32(np.uint32(shift << np.uint32(23)) + np.uint32(0x00400000))
    negative = np.uint32(8 if is_four else 128)
    for block in range(len(scales)):
        scale = scales[block]
        inverse = np.float32(1.0) / scale  # of a power of two: exact
        begin = np.uint64(block * 32)
        signal, noise = np.float32(0.0), np.float32(0.0)
        for i in range(32):
            value = value_of(stored[row, begin + np.uint64(i)])
            size = abs(value) * inverse
            size = size if size < largest else largest
            octave = np.uint32(bits_of(size) & INFINITY_BITS)
            octave = octave if octave > smallest_normal else smallest_normal
            magic = float_of(octave + lift)
            shifted = size + magic
            significand = np.uint32(bits_of(shifted) - bits_of(magic))
            code = np.uint32(significand + np.uint32(np.uint32(octave - smallest_normal) >> shift))
            sign = negative if value < np.float32(0.0) else np.uint32(0)
            codes[row, begin + np.uint64(i)] = np.uint8(code | sign)
            signal = add_square(signal, value)
            noise = add_square(noise, error_of(abs(value), shifted - magic, scale))
        sums[0] += np.float64(signal)
        sums[1] += np.float64(noise)


@jit
def round_mx(stored, mantissa, largest, codes, exponents, sums):  # type: ignore[no-untyped-def]
    """Round rows of stored weights to e2m1 or e4m3 with one power-of-two scale for 32 weights ("floor" exponents).

    stored      [rows, in] bits, their dtype one of BF16, F16, F32; in divisible by 32
    mantissa    stored fraction bits: 1 for e2m1, 3 for e4m3
    largest     the element's largest value, 6 or 448, float32
    codes       [rows, in] uint8, filled: e2m1 codes, or the bits of float8_e4m3fn
    exponents   [rows, in / 32] uint8, filled: E8M0
    sums, returns  as `rounding.round_integer`
    """
    rows, width = stored.shape
    tops, bottoms = np.empty(width // 32, stored.dtype), np.empty(width // 32, stored.dtype)
    scales = np.empty(width // 32, np.float32)
    for row in range(rows):
        ends_of_blocks(stored, row, 32, tops, bottoms)
        _mx_scales(tops, bottoms, largest, scales, exponents, row)
        bad = first_infinite(scales)
        if bad >= 0:
            return row * width + bad * 32
        _mx_codes(stored, row, mantissa, largest, scales, codes, sums)
    return np.int64(-1)
