"""`ops.blocks` in numba: the types that search, sixteen blocks at a time; the same bits.

All arrays are C-contiguous. rows is [rows, in] float32, finite. Blocks have n = 16 or 32 weights and are counted
through all rows; sixteen of them make one or two whole super-blocks. Filled are (as `ops.blocks.StoredBlocks` has them)

    codes               [rows, in] uint8
    scales, lows        [rows, in / 256 or in / 32] uint16, float16 bits
    levels, low_levels  [rows, in / n] uint8
"""

from __future__ import annotations

import numpy as np

from roundel.ops.block_search import EMPTY
from roundel.ops.numba.block_search import (
    affine_fit,
    bounded,
    entry_of,
    positive_fit,
    signed_descent,
    signed_fit,
    table_fit,
)
from roundel.ops.numba.compiling import jit
from roundel.ops.numba.lanes import LANES, choose, every, load, magnitude, nearest, root, store, store_bytes
from roundel.ops.numba.rounding import half_bits, half_of

__all__ = [
    "EMPHASIS",
    "GIVEN",
    "SIZE",
    "SPREAD",
    "SQUARE",
    "energies_of",
    "round_affine",
    "round_signed",
    "round_table",
]

# How much an error at each weight x counts in the search
SIZE = 0  # |x|
SPREAD = 1  # root mean square of the block + |x|
SQUARE = 2  # x^2
EMPHASIS = 3  # importance * sqrt(energy + x^2)
GIVEN = 4  # importance
SUPER = 256
ZERO, ONE = np.float32(0.0), np.float32(1.0)
NOTHING = np.float32(EMPTY)


@jit
def energies_of(values, factor, energies):  # type: ignore[no-untyped-def]
    """factor * sum of squares / count of each row of values [n, count]."""
    for row in range(values.shape[0]):
        total = ZERO
        for i in range(values.shape[1]):
            total += values[row, i] * values[row, i]
        energies[row] = np.float32(factor) * total / np.float32(values.shape[1])


@jit
def _columns(n):  # type: ignore[no-untyped-def]
    return np.zeros((n, LANES), np.float32)


@jit
def _gather(rows, first, x):  # type: ignore[no-untyped-def]
    """Sixteen blocks from `first` on as columns; zeros beyond the last. rows: of all blocks [blocks, n]."""
    for lane in range(LANES):
        if first + lane < rows.shape[0]:
            for i in range(x.shape[0]):
                x[i, lane] = rows[first + lane, i]
        else:
            for i in range(x.shape[0]):
                x[i, lane] = ZERO


@jit
def _scatter(found, first, codes):  # type: ignore[no-untyped-def]
    """Columns -> blocks: the inverse of `_gather`."""
    for lane in range(min(LANES, codes.shape[0] - first)):
        for i in range(found.shape[0]):
            codes[first + lane, i] = found[i, lane]


@jit
def _weigh(kind, x, importance, first, energies, span, weight):  # type: ignore[no-untyped-def]
    """weight [n, 16] of blocks from `first` on. span: weights that share one of `energies`."""
    n = x.shape[0]
    if kind in (GIVEN, EMPHASIS):
        per_row = importance.shape[1] // n
        for lane in range(LANES):
            row = (first + lane) // per_row % importance.shape[0]
            begin = (first + lane) % per_row * n
            for i in range(n):
                weight[i, lane] = importance[row, begin + i]
    energy = every(ZERO)
    if kind == EMPHASIS:
        shared = np.empty((1, LANES), np.float32)
        for lane in range(LANES):
            shared[0, lane] = energies[min((first + lane) * n // span, len(energies) - 1)]
        energy = load(shared, 0)
    elif kind == SPREAD:
        for i in range(n):
            energy = energy + load(x, i) * load(x, i)
        energy = root(energy / np.float32(n))
    for i in range(n):
        value = load(x, i)
        if kind == SIZE:
            store(weight, i, magnitude(value))
        elif kind == SPREAD:
            store(weight, i, energy + magnitude(value))
        elif kind == SQUARE:
            store(weight, i, value * value)
        elif kind == EMPHASIS:
            store(weight, i, load(weight, i) * root(energy + value * value))


@jit
def _totals(weight):  # type: ignore[no-untyped-def]
    total = every(ZERO)
    for i in range(weight.shape[0]):
        total = total + load(weight, i)
    return total


@jit
def _top_levels(values, begin, count, top, levels):  # type: ignore[no-untyped-def]
    """Levels of values[begin : begin + count], the largest of which gets the top one; returns the step."""
    high = ZERO
    for j in range(begin, begin + count):
        high = max(high, values[j])
    inverse = top / high if high > ZERO else ZERO
    for j in range(begin, begin + count):
        levels[j] = min(np.rint(inverse * values[j]), top)
    return high / top


@jit
def round_affine(  # type: ignore[no-untyped-def]
    rows, importance, energies, kind, n, largest, factors, absolute, top, codes, scales, lows, levels, low_levels
):
    """Types of a scale and a minimum: Q2_K, Q4_K, Q5_K; with top = 0, Q4_1 and Q5_1 by their search.

    largest, top   float32, of codes and levels
    """
    blocks, found_codes = rows.reshape(-1, n), codes.reshape(-1, n)
    span = rows.size // max(len(energies), 1)
    x, weight, trial = _columns(n), _columns(n), _columns(n)
    found = np.empty((n, LANES), np.uint8)
    fits = np.empty((4, LANES), np.float32)  # scale, low, total weight, and the steps that are stored
    held = np.empty((2, LANES), np.float32)  # levels of both
    per_super = SUPER // n
    y, y_weight, y_codes = _columns(per_super), _columns(per_super), _columns(per_super)
    flat_scales, flat_lows = scales.reshape(-1), lows.reshape(-1)
    flat_levels, flat_low_levels = levels.reshape(-1), low_levels.reshape(-1)
    for first in range(0, blocks.shape[0], LANES):
        _gather(blocks, first, x)
        _weigh(kind, x, importance, first, energies, span, weight)
        scale, low, inverse, base = affine_fit(x, weight, trial, largest, factors, absolute)
        store(fits, 0, scale)
        store(fits, 1, low)
        filled = min(LANES, blocks.shape[0] - first)
        if top == ZERO:
            for lane in range(filled):
                flat_scales[first + lane] = half_bits(half_of(fits[0, lane]))
                flat_lows[first + lane] = half_bits(half_of(-fits[1, lane]))
            for i in range(n):
                store_bytes(found, i, bounded(nearest(inverse * (load(x, i) - base)), ZERO, largest))
            _scatter(found, first, found_codes)
            continue
        searched = kind == EMPHASIS
        if searched:
            store(fits, 2, _totals(weight))
            for lane in range(LANES):
                column = lane // per_super * 2
                for each in range(2):
                    y[lane % per_super, column + each] = fits[each, lane]
                    y_weight[lane % per_super, column + each] = fits[2, lane]
            store(fits, 3, positive_fit(y, y_weight, y_codes, top))
        for begin in range(0, filled, per_super):
            column = begin // per_super * 2
            if searched:
                step, ground = fits[3, column], fits[3, column + 1]
                for j in range(per_super):
                    held[0, begin + j], held[1, begin + j] = y_codes[j, column], y_codes[j, column + 1]
            else:
                step = _top_levels(fits[0], begin, per_super, top, held[0])
                ground = _top_levels(fits[1], begin, per_super, top, held[1])
            step, ground = half_of(step), half_of(ground)
            at = (first + begin) // per_super
            flat_scales[at], flat_lows[at] = half_bits(step), half_bits(ground)
            for j in range(begin, begin + per_super):
                flat_levels[first + j] = np.uint8(np.int32(held[0, j]))
                flat_low_levels[first + j] = np.uint8(np.int32(held[1, j]))
                held[0, j] *= step
                held[1, j] *= ground
        steps, grounds = load(held, 0), load(held, 1)
        told = steps != ZERO
        for i in range(n):
            value = load(x, i)
            code = bounded(nearest((value + grounds) / steps), ZERO, largest)
            kept = bounded(nearest(inverse * (value - base)), ZERO, largest)
            store_bytes(found, i, choose(told, code, kept))
        _scatter(found, first, found_codes)


@jit
def _edge_levels(values, top, levels):  # type: ignore[no-untyped-def]
    """Levels -top ... top - 1 of sixteen values, the largest of which gets -top; returns the step and that value."""
    edge = ZERO
    for j in range(LANES):
        if abs(values[j]) > abs(edge):
            edge = values[j]
    inverse = -top / edge
    for j in range(LANES):
        levels[j] = max(min(np.rint(inverse * values[j]), top - ONE), -top) if edge != ZERO else -top
    return (ONE / inverse if edge != ZERO else ZERO), edge


@jit
def round_signed(  # type: ignore[no-untyped-def]
    rows, importance, energies, kind, n, half, descends, top, codes, scales, levels
):
    """Types of a scale alone: Q3_K, Q6_K; with top = 0, Q4_0 and Q5_0 by their search.

    half, top   float32, half the range of codes and of levels; top 128: levels are stored as they are (Q6_K)
    descends    codes are found by descent, with weights x^2
    """
    blocks, found_codes = rows.reshape(-1, n), codes.reshape(-1, n)
    span = rows.size // max(len(energies), 1)
    x, weight, kept = _columns(n), _columns(n), _columns(n)
    found = np.empty((n, LANES), np.uint8)
    fits, held = np.empty((2, LANES), np.float32), np.empty((1, LANES), np.float32)
    y, y_weight = _columns(LANES), _columns(LANES)
    flat_scales, flat_levels = scales.reshape(-1), levels.reshape(-1)
    for first in range(0, blocks.shape[0], LANES):
        _gather(blocks, first, x)
        _weigh(kind, x, importance, first, energies, span, weight)
        if descends:
            scale, edge = signed_descent(x, weight, kept, half)
        else:
            scale, inverse, edge = signed_fit(x, weight, half)
            for i in range(n):
                store(kept, i, bounded(nearest(inverse * load(x, i)), -half, half - ONE))
        store(fits, 0, scale)
        empty = magnitude(edge) < NOTHING
        if top == ZERO:
            for lane in range(min(LANES, blocks.shape[0] - first)):
                flat_scales[first + lane] = half_bits(half_of(fits[0, lane]))
            for i in range(n):
                store_bytes(found, i, choose(empty, every(ZERO), load(kept, i) + half))
            _scatter(found, first, found_codes)
            continue
        stored = np.int32(top) if top < np.float32(128.0) else np.int32(0)
        nothing = False
        if kind == EMPHASIS:
            store(fits, 1, _totals(weight))
            for j in range(LANES):
                y[j, 0], y_weight[j, 0] = fits[0, j], fits[1, j]
            y_scale, y_inverse, y_edge = signed_fit(y, y_weight, top)
            store(fits, 1, y_scale)
            step = half_of(fits[1, 0])
            store(fits, 0, y_inverse)
            store(fits, 1, y_edge)
            for j in range(LANES):
                level = max(min(np.rint(fits[0, 0] * y[j, 0]), top - ONE), -top)
                held[0, j] = level if abs(fits[1, 0]) >= NOTHING else -top
        else:
            step, high = _edge_levels(fits[0], top, held[0])
            step = half_of(step)
            if stored == 0 and abs(high) < NOTHING:
                nothing, step = True, ZERO
                held[0, :] = ZERO
        flat_scales[first // LANES] = half_bits(step)
        for j in range(LANES):
            flat_levels[first + j] = np.uint8(np.int32(held[0, j]) + stored)
            held[0, j] *= step
        steps = load(held, 0)
        told = steps != ZERO
        for i in range(n):
            code = bounded(nearest(load(x, i) / steps), -half, half - ONE) + half
            before = choose(empty, every(ZERO), load(kept, i) + half)
            store_bytes(found, i, every(ZERO) if nothing else choose(told, code, before))
        _scatter(found, first, found_codes)


@jit
def round_table(  # type: ignore[no-untyped-def]
    rows, importance, energies, kind, middles, gaps, lowest, supers, codes, scales, levels
):
    """Types of a table: IQ4_XS (supers) and IQ4_NL. middles, gaps [entries - 1], lowest: see `entry_of`."""
    n = 32
    blocks, found_codes = rows.reshape(-1, n), codes.reshape(-1, n)
    span = rows.size // max(len(energies), 1)
    x, weight = _columns(n), _columns(n)
    found = np.empty((n, LANES), np.uint8)
    fits = np.empty((1, LANES), np.float32)
    ones = np.ones(len(middles), np.float32)
    flat_scales, flat_levels = scales.reshape(-1), levels.reshape(-1)
    for first in range(0, blocks.shape[0], LANES):
        _gather(blocks, first, x)
        _weigh(kind, x, importance, first, energies, span, weight)
        store(fits, 0, table_fit(x, weight, middles, gaps, lowest))
        filled = min(LANES, blocks.shape[0] - first)
        if supers:
            for begin in range(0, filled, 8):
                edge = ZERO
                for j in range(begin, begin + 8):
                    if abs(fits[0, j]) > abs(edge):
                        edge = fits[0, j]
                step = -edge / np.float32(32.0)
                inverse = ONE / step if step != ZERO else ZERO
                flat_scales[(first + begin) // 8] = half_bits(half_of(step))
                for j in range(begin, begin + 8):
                    level = max(min(np.rint(inverse * fits[0, j]), np.float32(31.0)), np.float32(-32.0))
                    flat_levels[first + j] = np.uint8(np.int32(level) + 32)
                    fits[0, j] = step * level
        else:
            for lane in range(filled):
                flat_scales[first + lane] = half_bits(half_of(fits[0, lane]))
        steps = load(fits, 0)
        inverses = choose(steps != ZERO, every(ONE) / steps, every(ZERO))
        for i in range(n):
            store_bytes(found, i, entry_of(inverses * load(x, i), middles, ones))
        _scatter(found, first, found_codes)
