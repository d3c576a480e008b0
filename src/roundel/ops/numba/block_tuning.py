"""`ops.block_tuning` for types of even steps in numba, sixteen blocks side by side, one in each lane; the same bits.

Sixteen blocks are one or two whole super-blocks. What they have is rows of a [4, 16] array, what a super-block shares
standing in each of its lanes: the shared step, levels, the shared ground, levels of grounds.
"""

from __future__ import annotations

import numpy as np

from roundel.ops.numba.block_search import bounded
from roundel.ops.numba.compiling import jit
from roundel.ops.numba.lanes import LANES, choose, every, load, nearest, store
from roundel.ops.numba.rounding import half_of

__all__ = ["tune"]

ZERO, ONE, LARGEST = np.float32(0.0), np.float32(1.0), np.float32(65504.0)
NEGLIGIBLE = np.float32(1e-6)
STEP, LEVEL, GROUND, LOW_LEVEL = 0, 1, 2, 3


@jit
def _as_half(value):  # type: ignore[no-untyped-def]
    """As float16 holds it, finite."""
    if value != value:
        return ZERO
    return half_of(max(min(value, LARGEST), -LARGEST))


@jit
def _inverse(steps):  # type: ignore[no-untyped-def]
    return choose(steps != ZERO, every(ONE) / steps, every(ZERO))


@jit
def _errors(x, weight, now, low, high):  # type: ignore[no-untyped-def]
    """Of each lane, with the best codes."""
    steps = load(now, STEP) * load(now, LEVEL)
    grounds = load(now, GROUND) * load(now, LOW_LEVEL)
    inverse = _inverse(steps)
    error = every(ZERO)
    for i in range(x.shape[0]):
        value = load(x, i)
        code = bounded(nearest((value + grounds) * inverse), low, high)
        rest = code * steps - value - grounds
        error = error + rest * rest * load(weight, i)
    return error


@jit
def _total(sums, blocks):  # type: ignore[no-untyped-def]
    """Each row's sums over the lanes of a super-block, in all of its lanes."""
    for row in range(sums.shape[0]):
        for begin in range(0, LANES, blocks):
            total = sums[row, begin]
            for lane in range(begin + 1, begin + blocks):
                total += sums[row, lane]
            sums[row, begin : begin + blocks] = total


@jit
def _offer(x, weight, tried, now, least, sums, blocks, low, high):  # type: ignore[no-untyped-def]
    """Take what was tried where its super-block errs less."""
    store(sums, 0, _errors(x, weight, tried, low, high))
    _total(sums[:1], blocks)
    for lane in range(LANES):
        if sums[0, lane] < least[lane]:
            least[lane] = sums[0, lane]
            now[:, lane] = tried[:, lane]


@jit
def _fit(x, weight, tried, sums, blocks, low, high, grounded):  # type: ignore[no-untyped-def]
    """The shared numbers of least squares for the levels of `tried`, and for the codes that it gives, in place."""
    levels, lows = load(tried, LEVEL), load(tried, LOW_LEVEL)
    grounds = load(tried, GROUND) * lows
    inverse = _inverse(load(tried, STEP) * levels)
    square = every(ZERO)
    product = every(ZERO)
    crossed = every(ZERO)
    low_square = every(ZERO)
    low_product = every(ZERO)
    for i in range(x.shape[0]):
        value, counts = load(x, i), load(weight, i)
        spread = bounded(nearest((value + grounds) * inverse), low, high) * levels
        counted = counts * spread
        square = square + counted * spread
        product = product + counted * value
        weighed = counts * lows
        crossed = crossed + counted * lows
        low_square = low_square + weighed * lows
        low_product = low_product + weighed * value
    store(sums, 0, square)
    store(sums, 1, product)
    store(sums, 2, crossed)
    store(sums, 3, low_square)
    store(sums, 4, low_product)
    _total(sums, blocks)
    for lane in range(LANES):
        a, p, c, b, q = sums[0, lane], sums[1, lane], sums[2, lane], sums[3, lane], sums[4, lane]
        if not grounded:
            tried[STEP, lane] = _as_half(p / a if a > ZERO else tried[STEP, lane])
            continue
        determinant = a * b - c * c
        sound = determinant > NEGLIGIBLE * a * b
        tried[STEP, lane] = _as_half((p * b - q * c) / determinant if sound else tried[STEP, lane])
        tried[GROUND, lane] = _as_half((p * c - q * a) / determinant if sound else tried[GROUND, lane])


@jit
def _move(x, weight, now, tried, best, sums, low, high, bounds):  # type: ignore[no-untyped-def]
    """Each lane's levels moved by at most one, for its least error, into `best`."""
    best[:] = now
    store(sums, 1, _errors(x, weight, now, low, high))
    reach = 1 if bounds[3] > bounds[2] else 0
    for change in range(-1, 2):
        for low_change in range(-reach, reach + 1):
            if change == 0 and low_change == 0:
                continue
            for lane in range(LANES):
                tried[:, lane] = now[:, lane]
                tried[LEVEL, lane] = max(min(now[LEVEL, lane] + np.float32(change), bounds[1]), bounds[0])
                if reach:
                    moved = now[LOW_LEVEL, lane] + np.float32(low_change)
                    tried[LOW_LEVEL, lane] = max(min(moved, bounds[3]), bounds[2])
            store(sums, 0, _errors(x, weight, tried, low, high))
            for lane in range(LANES):
                if sums[0, lane] < sums[1, lane]:
                    sums[1, lane] = sums[0, lane]
                    best[:, lane] = tried[:, lane]


@jit
def tune(rows, importance, numbers, blocks, low, high, bounds, factors, rounds):  # type: ignore[no-untyped-def]
    """Improve `numbers` in place.

    rows        [blocks of the matrix, n] float32
    importance  [in] float32
    numbers     [4, blocks of the matrix] float32: step, level, ground, low level, of every block
    blocks      of a super-block: 1, 8 or 16
    low, high   float32, of codes
    bounds      [4] float32: lowest and highest level, lowest and highest low level; both alike where there are none
    factors     [trials, 2] float32
    """
    count, n = rows.shape
    per_row = len(importance) // n
    x, weight = np.zeros((n, LANES), np.float32), np.zeros((n, LANES), np.float32)
    now, begun, tried = (
        np.zeros((4, LANES), np.float32),
        np.zeros((4, LANES), np.float32),
        np.zeros((4, LANES), np.float32),
    )
    best, sums, least = np.zeros((4, LANES), np.float32), np.zeros((5, LANES), np.float32), np.zeros(LANES, np.float32)
    levelled, low_levelled = bounds[1] > bounds[0], bounds[3] > bounds[2]
    grounded = low_levelled or bounds[2] == ONE
    for first in range(0, count, LANES):
        filled = min(LANES, count - first)
        for lane in range(LANES):
            for i in range(n):
                x[i, lane] = rows[first + lane, i] if lane < filled else ZERO
                weight[i, lane] = importance[(first + lane) % per_row * n + i] if lane < filled else ZERO
            for row in range(4):
                now[row, lane] = numbers[row, first + lane] if lane < filled else ZERO
        begun[:] = now
        store(sums, 0, _errors(x, weight, now, low, high))
        _total(sums[:1], blocks)
        least[:] = sums[0]
        for k in range(len(factors)):
            factor, low_factor = factors[k, 0], factors[k, 1]
            for lane in range(LANES):
                tried[:, lane] = begun[:, lane]
                tried[STEP, lane] = _as_half(begun[STEP, lane] * factor)
                if levelled:
                    tried[LEVEL, lane] = max(min(np.rint(begun[LEVEL, lane] / factor), bounds[1]), bounds[0])
                if low_levelled:
                    tried[GROUND, lane] = _as_half(begun[GROUND, lane] * low_factor)
                    tried[LOW_LEVEL, lane] = max(
                        min(np.rint(begun[LOW_LEVEL, lane] / low_factor), bounds[3]), bounds[2]
                    )
            _fit(x, weight, tried, sums, blocks, low, high, grounded)
            _offer(x, weight, tried, now, least, sums, blocks, low, high)
        for _ in range(rounds):
            if levelled:
                _move(x, weight, now, tried, best, sums, low, high, bounds)
                _offer(x, weight, best, now, least, sums, blocks, low, high)
            tried[:] = now
            _fit(x, weight, tried, sums, blocks, low, high, grounded)
            _offer(x, weight, tried, now, least, sums, blocks, low, high)
        for lane in range(filled):
            for row in range(4):
                numbers[row, first + lane] = now[row, lane]
