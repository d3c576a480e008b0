"""Plain rounding to integers in numba: stored bits -> codes and scales. Bit-equal to `ops.encode`.

A row is passed over three times: for the ends of each block's range, the grids, the codes. Adding 1.5 * 2^23 to
a float32 rounds it to a whole number, half to even, and leaves that number in its low bits.
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

__all__ = ["half_bits", "half_of", "round_integer"]

MAGIC = np.float32(12582912.0)  # 1.5 * 2^23
SIGN = np.uint32(0x80000000)
INFINITY_BITS = np.uint32(0x7F800000)
SMALLEST = np.float32(1.0013580322265625e-05)  # 1e-5 in float16


@jit
def half_of(value):  # type: ignore[no-untyped-def]
    """float32 -> the nearest float16 as float32, half to even; at or above 65520 it is infinity."""
    bits = bits_of(value)
    size = np.uint32(bits & ~SIGN)
    odd = np.uint32(np.uint32(size >> np.uint32(13)) & np.uint32(1))
    found = np.uint32(np.uint32(size + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000))
    steps = float_of(size) + np.float32(0.75)  # below 2^-14: whole steps of 2^-24
    found = bits_of(steps - np.float32(0.75)) if size < np.uint32(0x38800000) else found
    found = INFINITY_BITS if size >= np.uint32(0x477FF000) else found
    return float_of(found | np.uint32(bits & SIGN))


@jit
def half_bits(value):  # type: ignore[no-untyped-def]
    """The 16 bits of a float32 that is a float16 already."""
    bits = bits_of(value)
    size = np.uint32(bits & ~SIGN)
    found = np.uint32(np.uint32(size - np.uint32(0x38000000)) >> np.uint32(13))
    steps = np.uint32(np.int32(float_of(size) * np.float32(16777216.0)))
    found = steps if size < np.uint32(0x38800000) else found
    found = np.uint32(0x7C00) if size == INFINITY_BITS else found
    return np.uint16(found | np.uint32(np.uint32(bits & SIGN) >> np.uint32(16)))


@jit
def _symmetric_grids(tops, bottoms, bits, scales, zeros):  # type: ignore[no-untyped-def]
    """Ends of blocks -> scales (float16 as float32; infinite where the block or its scale is not finite) and zeros."""
    steps = np.float32(1 << (bits - 1))
    for block in range(len(tops)):
        high, low = value_of(tops[block]), -value_of(bottoms[block])
        scale = half_of((low if low > high else -high) / steps)
        size = abs(scale) if abs(scale) > SMALLEST else SMALLEST
        scale = -size if scale < np.float32(0.0) else size
        scales[block] = scale if high < INFINITY and low < INFINITY else INFINITY
        zeros[block] = steps


@jit
def _asymmetric_grids(tops, bottoms, bits, lowest_zero, scales, zeros):  # type: ignore[no-untyped-def]
    """As `_symmetric_grids`. A zero point below `lowest_zero` is raised to it, and the scale with it."""
    largest, lowest = np.float32((1 << bits) - 1), np.float32(lowest_zero)
    for block in range(len(tops)):
        high, low = value_of(tops[block]), -value_of(bottoms[block])
        scale = half_of((high + low) / largest)
        scale = scale if scale > SMALLEST else SMALLEST
        raised = half_of((high + low) / (largest - lowest))
        raised = raised if raised > SMALLEST else SMALLEST
        zero = (low / scale + MAGIC) - MAGIC
        zero = zero if zero < largest else largest
        scale = raised if zero < lowest else scale
        scales[block] = scale if high < INFINITY and low < INFINITY else INFINITY
        zeros[block] = zero if zero > lowest else lowest


@jit
def _codes(stored, row, group, bits, scales, zeros, codes, sums):  # type: ignore[no-untyped-def]
    width = stored.shape[1]
    for block in range(len(scales)):
        scale = scales[block]
        lowest = MAGIC - zeros[block]
        highest = lowest + np.float32((1 << bits) - 1)
        offset = bits_of(lowest)
        begin = np.uint64(block * group)
        signal, noise = np.float32(0.0), np.float32(0.0)
        for i in range(min(group, width - block * group)):
            value = value_of(stored[row, begin + np.uint64(i)])
            rounded = value / scale + MAGIC
            rounded = rounded if rounded > lowest else lowest
            rounded = rounded if rounded < highest else highest
            codes[row, begin + np.uint64(i)] = np.uint8(np.uint32(bits_of(rounded) - offset))
            signal = add_square(signal, value)
            noise = add_square(noise, error_of(value, rounded - MAGIC, scale))
        sums[0] += np.float64(signal)
        sums[1] += np.float64(noise)


@jit
def round_integer(stored, bits, group, symmetric, lowest_zero, codes, scales, zeros, sums):  # type: ignore[no-untyped-def]
    """Round rows of stored weights to integers.

    stored   [rows, in] bits, their dtype one of BF16, F16, F32
    group    weights in a block; the last may be short
    lowest_zero   smallest zero point allowed: 0, or 1 for readers that cannot store a 0
    codes    [rows, in] uint8, filled: unsigned codes, for symmetric grids code + 2^(bits-1)
    scales   [rows, groups] uint16, filled: float16 bits
    zeros    [rows, groups] uint8, filled
    sums     [2] float64, added to: the sum of squares, and of squared rounding errors
    returns  the flat index of the first weight of the first block that is not finite (or whose scale leaves float16);
             -1 when all is well
    """
    rows, width = stored.shape
    groups = (width + group - 1) // group
    tops, bottoms = np.empty(groups, stored.dtype), np.empty(groups, stored.dtype)
    row_scales, row_zeros = np.empty(groups, np.float32), np.empty(groups, np.float32)
    for row in range(rows):
        ends_of_blocks(stored, row, group, tops, bottoms)
        if symmetric:
            _symmetric_grids(tops, bottoms, bits, row_scales, row_zeros)
        else:
            _asymmetric_grids(tops, bottoms, bits, lowest_zero, row_scales, row_zeros)
        bad = first_infinite(row_scales)
        if bad >= 0:
            return row * width + bad * group
        for block in range(groups):
            scales[row, block] = half_bits(row_scales[block])
            zeros[row, block] = np.uint8(row_zeros[block])
        _codes(stored, row, group, bits, row_scales, row_zeros, codes, sums)
    return np.int64(-1)
