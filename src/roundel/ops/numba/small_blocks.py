"""`ops.blocks` in numba: the types that need no search; the same bits. Arrays as in `ops.numba.blocks`."""

from __future__ import annotations

import numba
import numpy as np

from roundel.ops.numba.rounding import half_bits, half_of
from roundel.ops.numba.stored import bits_of, float_of

__all__ = ["round_nearest_value", "round_spanning", "round_symmetric", "round_whole_steps"]

ZERO, ONE, HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)
MAGNITUDE = np.uint32(0x7FFFFFFF)

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)


@_jit
def _largest_magnitude(block):  # type: ignore[no-untyped-def]
    top = np.uint32(0)
    for i in range(len(block)):
        here = np.uint32(bits_of(block[i]) & MAGNITUDE)
        top = here if here > top else top
    return float_of(top)


@_jit
def round_symmetric(rows, half, codes, scales):  # type: ignore[no-untyped-def]
    """Q4_0 and Q5_0. half: half the range of codes, float32."""
    blocks, found = rows.reshape(-1, 32), codes.reshape(-1, 32)
    flat_scales = scales.reshape(-1)
    for index in range(blocks.shape[0]):
        block, line = blocks[index], found[index]
        size = _largest_magnitude(block)
        edge = ZERO
        if size > ZERO:
            for i in range(32):
                if abs(block[i]) == size:
                    edge = block[i]
                    break
        step = edge / -half
        inverse = ONE / step if step != ZERO else ZERO
        flat_scales[index] = half_bits(half_of(step))
        for i in range(32):
            code = np.int32(block[i] * inverse + (half + HALF))
            line[i] = np.uint8(min(code, np.int32(half + half - ONE)))


@_jit
def round_spanning(rows, largest, codes, scales, lows):  # type: ignore[no-untyped-def]
    """Q4_1 and Q5_1. largest: of codes, float32."""
    blocks, found = rows.reshape(-1, 32), codes.reshape(-1, 32)
    flat_scales, flat_lows = scales.reshape(-1), lows.reshape(-1)
    for index in range(blocks.shape[0]):
        block, line = blocks[index], found[index]
        low, high = np.uint32(0xFFFFFFFF), np.uint32(0)  # floats as integers in the same order
        for i in range(32):
            bits = np.int32(bits_of(block[i]))
            order = np.uint32(bits ^ ((bits >> np.int32(31)) | np.int32(-2147483648)))
            low = order if order < low else low
            high = order if order > high else high
        lowest = float_of(low ^ np.uint32(0x80000000) if low >= np.uint32(0x80000000) else ~low)
        highest = float_of(high ^ np.uint32(0x80000000) if high >= np.uint32(0x80000000) else ~high)
        if lowest == ZERO:  # of zeros of both signs, the first is taken
            for i in range(32):
                if block[i] == ZERO:
                    lowest = block[i]
                    break
        step = (highest - lowest + ZERO) / largest
        inverse = ONE / step if step != ZERO else ZERO
        flat_scales[index] = half_bits(half_of(step))
        flat_lows[index] = half_bits(half_of(lowest))
        for i in range(32):
            code = np.int32((block[i] - lowest) * inverse + HALF)
            line[i] = np.uint8(min(code, np.int32(largest)))


@_jit
def round_whole_steps(rows, n, largest, shift, codes, scales):  # type: ignore[no-untyped-def]
    """Q8_0 (largest 127, shift 0), and the ternary types (1 and 1). largest float32, shift int32."""
    blocks, found = rows.reshape(-1, n), codes.reshape(-1, n)
    flat_scales = scales.reshape(-1)
    for index in range(blocks.shape[0]):
        block, line = blocks[index], found[index]
        step = _largest_magnitude(block) / largest
        inverse = ONE / step if step != ZERO else ZERO
        flat_scales[index] = half_bits(half_of(step))
        for i in range(n):
            value = block[i] * inverse
            size = abs(value)
            down = np.floor(size)
            whole = np.int32(down + ONE if size - down >= HALF else down)
            line[i] = np.uint8((-whole if value < ZERO else whole) + shift)


@_jit
def round_nearest_value(rows, values, codes, scales):  # type: ignore[no-untyped-def]
    """MXFP4. values [16] float32; scales [rows, in / 32] uint8, exponents."""
    blocks, found = rows.reshape(-1, 32), codes.reshape(-1, 32)
    flat_scales = scales.reshape(-1)
    best = np.empty(32, np.float32)
    index_of = np.empty(32, np.float32)
    for index in range(blocks.shape[0]):
        block, line = blocks[index], found[index]
        exponent = np.int32(bits_of(_largest_magnitude(block)) >> np.uint32(23)) - np.int32(2)
        exponent = exponent if exponent > np.int32(0) else np.int32(0)
        flat_scales[index] = np.uint8(exponent)
        step = float_of(np.uint32(exponent) << np.uint32(23)) if exponent else float_of(np.uint32(0x00400000))
        for i in range(32):
            best[i] = np.inf
            index_of[i] = ZERO
        for code in range(16):
            value = values[code] * step
            for i in range(32):
                error = abs(value - block[i])
                nearer = error < best[i]
                index_of[i] = np.float32(code) if nearer else index_of[i]
                best[i] = error if nearer else best[i]
        for i in range(32):
            line[i] = np.uint8(np.int32(index_of[i]))
