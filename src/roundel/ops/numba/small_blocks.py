"""`ops.blocks` in numba: the types that need no search; the same bits. Arrays as in `ops.numba.blocks`."""

from __future__ import annotations

import numpy as np

from roundel.ops.numba.compiling import jit
from roundel.ops.numba.lanes import (
    LANES,
    choose,
    every,
    first_of,
    highest,
    largest_of,
    load,
    lowest,
    magnitude,
    store_bytes,
    whole_below,
)
from roundel.ops.numba.rounding import half_bits, half_of
from roundel.ops.numba.stored import bits_of, float_of

__all__ = ["round_nearest_value", "round_spanning", "round_symmetric", "round_whole_steps"]

ZERO, ONE, HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)


@jit
def _store_halves(values, halves):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        halves[i] = half_bits(half_of(values[i]))


@jit
def _first_in(left, right):  # type: ignore[no-untyped-def]
    """The first of 32 lanes where a condition holds."""
    lane = first_of(left)
    return lane if lane < LANES else LANES + first_of(right)


@jit
def _largest_magnitude(pieces, begin, end):  # type: ignore[no-untyped-def]
    size = magnitude(load(pieces, begin))
    for k in range(begin + 1, end):
        size = largest_of(magnitude(load(pieces, k)), size)
    return highest(size)


@jit
def round_symmetric(rows, half, codes, scales):  # type: ignore[no-untyped-def]
    """Q4_0 and Q5_0. half: half the range of codes, float32."""
    pieces, found = rows.reshape(-1, LANES), codes.reshape(-1, LANES)
    steps = np.empty(scales.size, np.float32)
    for index in range(len(steps)):
        at = 2 * index
        left, right = load(pieces, at), load(pieces, at + 1)
        high, low = highest(largest_of(left, right)), lowest(choose(left < right, left, right))
        edge = high + ZERO if high > -low else low
        if high == -low:  # the first of equals
            edge = rows.reshape(-1, 32)[index, _first_in(magnitude(left) == high, magnitude(right) == high)] + ZERO
        step = edge / -half
        steps[index] = step
        inverse = ONE / step if step != ZERO else ZERO
        for k in range(at, at + 2):
            code = whole_below(load(pieces, k) * inverse + (half + HALF))
            store_bytes(found, k, choose(code < half + half, code, half + half - ONE))
    _store_halves(steps, scales.reshape(-1))


@jit
def round_spanning(rows, largest, codes, scales, lows):  # type: ignore[no-untyped-def]
    """Q4_1 and Q5_1. largest: of codes, float32."""
    pieces, found = rows.reshape(-1, LANES), codes.reshape(-1, LANES)
    steps, grounds = np.empty(scales.size, np.float32), np.empty(scales.size, np.float32)
    for index in range(len(steps)):
        at = 2 * index
        left, right = load(pieces, at), load(pieces, at + 1)
        high = highest(largest_of(left, right))
        low = lowest(choose(left < right, left, right))
        if low == ZERO:  # of zeros of both signs, the first is taken
            low = rows.reshape(-1, 32)[index, _first_in(left == ZERO, right == ZERO)]
        step = (high - low + ZERO) / largest
        steps[index], grounds[index] = step, low
        inverse = ONE / step if step != ZERO else ZERO
        for k in range(at, at + 2):
            code = whole_below((load(pieces, k) - low) * inverse + HALF)
            store_bytes(found, k, choose(code < largest, code, largest))
    _store_halves(steps, scales.reshape(-1))
    _store_halves(grounds, lows.reshape(-1))


@jit
def round_whole_steps(rows, n, largest, shift, codes, scales):  # type: ignore[no-untyped-def]
    """Q8_0 (largest 127, shift 0), and the ternary types (1 and 1). largest, shift: float32."""
    pieces, found, count = rows.reshape(-1, LANES), codes.reshape(-1, LANES), n // LANES
    steps = np.empty(scales.size, np.float32)
    for index in range(len(steps)):
        at = count * index
        step = _largest_magnitude(pieces, at, at + count) / largest
        steps[index] = step
        inverse = ONE / step if step != ZERO else ZERO
        for k in range(at, at + count):
            value = load(pieces, k) * inverse
            size = magnitude(value)
            down = whole_below(size)
            whole = choose(size - down >= HALF, down + ONE, down)
            store_bytes(found, k, choose(value < ZERO, whole * -ONE, whole) + shift)
    _store_halves(steps, scales.reshape(-1))


@jit
def round_nearest_value(rows, values, codes, scales):  # type: ignore[no-untyped-def]
    """MXFP4. values [16] float32; scales [rows, in / 32] uint8, exponents."""
    pieces, found = rows.reshape(-1, LANES), codes.reshape(-1, LANES)
    flat_scales = scales.reshape(-1)
    for index in range(len(flat_scales)):
        at = 2 * index
        exponent = np.int32(bits_of(_largest_magnitude(pieces, at, at + 2)) >> np.uint32(23)) - np.int32(2)
        exponent = exponent if exponent > np.int32(0) else np.int32(0)
        flat_scales[index] = np.uint8(exponent)
        step = float_of(np.uint32(exponent) << np.uint32(23)) if exponent else float_of(np.uint32(0x00400000))
        for k in range(at, at + 2):
            x = load(pieces, k)
            best = magnitude(values[0] * step - x)
            code = every(ZERO)
            for each in range(1, 16):
                error = magnitude(values[each] * step - x)
                nearer = error < best
                code = choose(nearer, np.float32(each), code)
                best = choose(nearer, error, best)
            store_bytes(found, k, code)
