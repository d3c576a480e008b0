"""Plain rounding in numba: stored bits -> codes and scales, a row at a time. Bit-equal to `ops.encode`.

The kernels read weights as they are stored (the bits of bf16, fp16 or fp32). Two facts make them fast: among floats
of one sign, order is the order of their bits, so both ends of a block's range are found by integer maxima; and adding
1.5 * 2^23 to a float32 rounds it to a whole number, half to even, and leaves that number in its low bits.
numba has no float16 on CPU; scales are rounded to it by integer arithmetic on float32 bits.
"""

from __future__ import annotations

import numba
import numpy as np

__all__ = ["BF16", "F16", "F32", "mx_parameters", "round_integer", "round_mx"]

BF16, F16, F32 = 0, 1, 2  # how the stored bits are read
MAGIC = np.float32(12582912.0)  # 1.5 * 2^23
MAGIC_BITS = 0x4B400000
INFINITY_BITS = 0x7F800000
SMALLEST = np.float32(1.0013580322265625e-05)  # 1e-5 in float16

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)


def mx_parameters(element: str, largest: float) -> tuple[int, np.uint32]:
    """(fraction bits, float32 bits of the largest value) of e2m1 or e4m3, as `round_mx` takes them."""
    return (1 if element == "e2m1" else 3), np.float32(largest).view(np.uint32)


@numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _load(stored, row, begin, end, kind, as_bits, as_float):  # type: ignore[no-untyped-def]
    """One block of stored bits -> float32 in `as_float`, which shares memory with `as_bits`."""
    if kind == BF16:
        for i in range(end - begin):
            as_bits[i] = np.uint32(stored[row, begin + i]) << np.uint32(16)
    elif kind == F32:
        for i in range(end - begin):
            as_bits[i] = np.uint32(stored[row, begin + i])
    else:
        for i in range(end - begin):
            half = np.uint32(stored[row, begin + i])
            magnitude = half & np.uint32(0x7FFF)
            if magnitude >= np.uint32(0x7C00):
                as_bits[i] = np.uint32(INFINITY_BITS)
            else:
                as_bits[i] = magnitude << np.uint32(13)
                as_float[i] = as_float[i] * np.float32(5.192296858534828e33)  # 2^112: the difference of the biases
                as_bits[i] = as_bits[i] | ((half & np.uint32(0x8000)) << np.uint32(16))


@_jit
def _half(value, bits, floats):  # type: ignore[no-untyped-def]
    """float32 -> the nearest float16 as float32, half to even; at or above 65520 it is infinity."""
    floats[0] = value
    sign = bits[0] & np.uint32(0x80000000)
    size = bits[0] & np.uint32(0x7FFFFFFF)
    if size >= np.uint32(0x477FF000):
        bits[0] = np.uint32(INFINITY_BITS)
    elif size < np.uint32(0x38800000):  # below 2^-14: whole steps of 2^-24
        bits[0] = size
        floats[0] = (floats[0] + np.float32(0.75)) - np.float32(0.75)
    else:
        bits[0] = (size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    bits[0] = bits[0] | sign
    return floats[0]


@_jit
def _half_bits(value, bits, floats):  # type: ignore[no-untyped-def]
    """The 16 bits of a float32 that is a float16 already."""
    floats[0] = value
    sign = (bits[0] >> np.uint32(16)) & np.uint32(0x8000)
    size = bits[0] & np.uint32(0x7FFFFFFF)
    if size >= np.uint32(INFINITY_BITS):
        return np.uint16(sign | np.uint32(0x7C00))
    if size < np.uint32(0x38800000):
        bits[0] = size
        return np.uint16(sign | np.uint32(floats[0] * np.float32(16777216.0)))
    return np.uint16(sign | ((size - np.uint32(0x38000000)) >> np.uint32(13)))


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _squared(values, shifted, n, scale, sums):  # type: ignore[no-untyped-def]
    """Add the block's sum of squares, and of squared rounding errors, to `sums`. shifted: MAGIC + code - zero."""
    signal = np.float32(0.0)
    noise = np.float32(0.0)
    for i in range(n):
        error = values[i] - (shifted[i] - MAGIC) * scale
        signal += values[i] * values[i]
        noise += error * error
    sums[0] += np.float64(signal)
    sums[1] += np.float64(noise)


@_jit
def round_integer(stored, kind, bits, group, symmetric, lowest_zero, codes, scales, zeros, sums):  # type: ignore[no-untyped-def]
    """Round rows of stored weights to integers.

    stored   [rows, in] uint16 (bf16, fp16) or uint32 (fp32) bits
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
    as_bits = np.empty(group, dtype=np.uint32)
    as_float = as_bits.view(np.float32)
    as_int = as_bits.view(np.int32)
    rounded = np.empty(group, dtype=np.float32)
    rounded_bits = rounded.view(np.int32)
    one_bits = np.empty(1, dtype=np.uint32)
    one_float = one_bits.view(np.float32)
    one_int = one_bits.view(np.int32)
    largest = (1 << bits) - 1
    for row in range(rows):
        for block in range((width + group - 1) // group):
            begin = block * group
            end = min(begin + group, width)
            n = end - begin
            _load(stored, row, begin, end, kind, as_bits, as_float)
            top = np.int32(0)
            bottom = np.uint32(0x80000000)
            for i in range(n):
                top = max(top, as_int[i])
                bottom = max(bottom, as_bits[i])
            low_bits = np.int32(bottom & np.uint32(0x7FFFFFFF))
            if top >= INFINITY_BITS or low_bits >= INFINITY_BITS:
                return row * width + begin
            one_int[0] = top
            high = one_float[0]
            one_int[0] = low_bits
            low = one_float[0]  # magnitude of the most negative weight
            if symmetric:
                extreme = low if low > high else -high
                scale = _half(extreme / np.float32(1 << (bits - 1)), one_bits, one_float)
                if scale < np.float32(0.0):
                    scale = min(scale, -SMALLEST)
                else:
                    scale = max(scale, SMALLEST)
                zero = np.int32(1 << (bits - 1))
            else:
                scale = max(_half((high + low) / np.float32(largest), one_bits, one_float), SMALLEST)
                one_float[0] = low / scale + MAGIC
                zero = min(one_int[0] - np.int32(MAGIC_BITS), np.int32(largest))
                if zero < lowest_zero:
                    zero = np.int32(lowest_zero)
                    scale = max(_half((high + low) / np.float32(largest - lowest_zero), one_bits, one_float), SMALLEST)
            if scale > np.float32(65504.0) or scale < np.float32(-65504.0):
                return row * width + begin
            for i in range(n):
                rounded[i] = as_float[i] / scale + MAGIC
            lowest = np.int32(MAGIC_BITS) - zero
            for i in range(n):
                rounded_bits[i] = min(max(rounded_bits[i], lowest), lowest + np.int32(largest))
            for i in range(n):
                codes[row, begin + i] = np.uint8(rounded_bits[i] - lowest)
            scales[row, block] = _half_bits(scale, one_bits, one_float)
            zeros[row, block] = np.uint8(zero)
            _squared(as_float, rounded, n, scale, sums)
    return np.int64(-1)


@_jit
def round_mx(stored, kind, mantissa, largest_bits, codes, exponents, sums):  # type: ignore[no-untyped-def]
    """Round rows of stored weights to e2m1 or e4m3 with one power-of-two scale for 32 weights ("floor" exponents).

    stored         [rows, in] bits, in divisible by 32
    mantissa       stored fraction bits: 1 for e2m1, 3 for e4m3
    largest_bits   float32 bits of the element's largest value, 6 or 448
    codes          [rows, in] uint8, filled: e2m1 codes, or the bits of float8_e4m3fn
    exponents      [rows, in / 32] uint8, filled: E8M0
    sums, returns  as `round_integer`
    """
    rows, width = stored.shape
    as_bits = np.empty(32, dtype=np.uint32)
    as_float = as_bits.view(np.float32)
    size_bits = np.empty(32, dtype=np.uint32)
    size = size_bits.view(np.float32)
    small = np.empty(32, dtype=np.float32)
    small_bits = small.view(np.uint32)
    one_bits = np.empty(1, dtype=np.uint32)
    one_float = one_bits.view(np.float32)
    shift = np.uint32(23 - mantissa)
    half = (np.uint32(1) << (shift - np.uint32(1))) - np.uint32(1)
    exponent_bits = 2 if mantissa == 1 else 4
    bias = (1 << (exponent_bits - 1)) - 1
    smallest_normal = np.uint32(128 - bias) << np.uint32(23)
    steps, _ = _power_of_two(bias - 1 + mantissa, one_bits, one_float)  # subnormal steps in 1.0
    step, _ = _power_of_two(1 - bias - mantissa, one_bits, one_float)
    rebias = np.uint32(127 - bias) << np.uint32(mantissa)
    sign_shift = np.uint32(28 if mantissa == 1 else 24)
    for row in range(rows):
        for block in range(width // 32):
            begin = block * 32
            _load(stored, row, begin, begin + 32, kind, as_bits, as_float)
            largest = np.uint32(0)
            for i in range(32):
                largest = max(largest, as_bits[i] & np.uint32(0x7FFFFFFF))
            if largest >= np.uint32(INFINITY_BITS):
                return row * width + begin
            exponent = _floor_log2(largest, one_bits, one_float) - (np.int64(largest_bits >> np.uint32(23)) - 127)
            exponent = min(max(exponent, -127), 127)
            inverse, inverse_rest = _power_of_two(-exponent, one_bits, one_float)
            scale, scale_rest = _power_of_two(exponent, one_bits, one_float)
            for i in range(32):
                size[i] = abs(as_float[i]) * inverse * inverse_rest
            for i in range(32):
                size_bits[i] = min(size_bits[i], largest_bits)
                small[i] = size[i] * steps + MAGIC
            for i in range(32):
                normal = size_bits[i] + half + ((size_bits[i] >> shift) & np.uint32(1))
                is_normal = size_bits[i] >= smallest_normal
                subnormal = small_bits[i] - np.uint32(MAGIC_BITS)
                code = (normal >> shift) - rebias if is_normal else subnormal
                negative = as_float[i] < np.float32(0.0)
                sign = (np.uint32(0x80000000) if negative else np.uint32(0)) >> sign_shift
                codes[row, begin + i] = np.uint8(code | sign)
                size_bits[i] = (normal >> shift) << shift
                small[i] = np.float32(subnormal) * step
                value = size[i] if is_normal else small[i]
                size[i] = (-value if negative else value) * scale * scale_rest
            exponents[row, block] = np.uint8(exponent + 127)
            _squared_error(as_float, size, sums)
    return np.int64(-1)


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})
def _squared_error(values, rounded, sums):  # type: ignore[no-untyped-def]
    signal = np.float32(0.0)
    noise = np.float32(0.0)
    for i in range(len(values)):
        error = values[i] - rounded[i]
        signal += values[i] * values[i]
        noise += error * error
    sums[0] += np.float64(signal)
    sums[1] += np.float64(noise)


@_jit
def _floor_log2(size, bits, floats):  # type: ignore[no-untyped-def]
    """floor(log2) of a non-negative float32 given by its bits; 1 for zero, as the definition has it."""
    if size == np.uint32(0):
        return np.int64(1)
    if size >= np.uint32(0x00800000):
        return np.int64(size >> np.uint32(23)) - 127
    bits[0] = size
    floats[0] = floats[0] * np.float32(16777216.0)  # a subnormal, lifted by 2^24
    return np.int64(bits[0] >> np.uint32(23)) - 127 - 24


@_jit
def _power_of_two(exponent, bits, floats):  # type: ignore[no-untyped-def]
    """2^exponent as two normal float32 factors, for exponents of -127 to 127; the second is 1 but at the lower end."""
    rest = np.float32(1.0)
    if exponent < -126:
        rest = np.float32(0.5)
        exponent += 1
    bits[0] = np.uint32(exponent + 127) << np.uint32(23)
    return floats[0], rest
