"""`ops.block_search` for sixteen blocks at a time, one in each lane; the same bits.

Blocks lie as columns: x and weight are [n, 16] float32, row i holding the i-th weight of every block.
"""

from __future__ import annotations

import numpy as np

from roundel.ops.block_search import EMPTY, POSITIVE_TRIALS, SIGNED_TRIALS, SWEEPS, TABLE_TRIALS
from roundel.ops.numba.compiling import jit
from roundel.ops.numba.lanes import (
    choose,
    every,
    largest_of,
    load,
    magnitude,
    nearest,
    none,
    store,
    wrapped,
)

__all__ = [
    "affine_fit",
    "bounded",
    "entry_of",
    "largest_in",
    "positive_fit",
    "signed_descent",
    "signed_fit",
    "table_fit",
]

ZERO, ONE, TENTH = np.float32(0.0), np.float32(1.0), np.float32(0.1)
NOTHING = np.float32(EMPTY)
LOWEST = np.float32(-(1 << 23))


@jit
def bounded(values, low, high):  # type: ignore[no-untyped-def]
    """Values within bounds; what is no number is the lower one."""
    values = largest_of(values, low)
    return choose(values < high, values, high)


@jit
def largest_in(x):  # type: ignore[no-untyped-def]
    """Of each block the value of largest magnitude, the first of equals."""
    edge = every(ZERO)
    size = every(ZERO)
    for i in range(x.shape[0]):
        value = load(x, i)
        here = magnitude(value)
        edge = choose(here > size, value, edge)
        size = largest_of(here, size)
    return edge


@jit
def _affine_error(x, weight, trial, scale, low, absolute):  # type: ignore[no-untyped-def]
    error = every(ZERO)
    if absolute:
        for i in range(x.shape[0]):
            error = error + load(weight, i) * magnitude(scale * load(trial, i) + low - load(x, i))
    else:
        for i in range(x.shape[0]):
            rest = scale * load(trial, i) + low - load(x, i)
            error = error + load(weight, i) * (rest * rest)
    return error


@jit
def affine_fit(x, weight, trial, largest, factors, absolute):  # type: ignore[no-untyped-def]
    """Scale and low as `ops.block_search.affine_fit` finds them; what gives their codes are inverse and base:

        code = bounded(nearest(inverse * (x - base)), 0, largest)

    trial     scratch, like x
    largest   float32
    factors   [trials] float32
    returns   scale, low, inverse, base; inverse 0 where a block is flat
    """
    total = every(ZERO)
    moment = every(ZERO)
    high = load(x, 0)
    low = load(x, 0)
    for i in range(x.shape[0]):
        value = load(x, i)
        counted = load(weight, i)
        total = total + counted
        moment = moment + counted * value
        high = largest_of(value, high)
        low = choose(value < low, value, low)
    low = choose(low > ZERO, every(ZERO), low)
    curved = high > low
    inverse = every(largest) / (high - low)
    scale = every(ONE) / inverse
    base = low
    for i in range(x.shape[0]):
        store(trial, i, bounded(nearest(inverse * (load(x, i) - low)), ZERO, largest))
    least = _affine_error(x, weight, trial, scale, low, absolute)
    for k in range(len(factors)):
        tried = every(factors[k]) / (high - low)
        ones = every(ZERO)
        squares = every(ZERO)
        products = every(ZERO)
        for i in range(x.shape[0]):
            value = load(x, i)
            code = bounded(nearest(tried * (value - low)), ZERO, largest)
            store(trial, i, code)
            counted = load(weight, i) * code
            ones = ones + counted
            squares = squares + counted * code
            products = products + counted * value
        determinant = total * squares - ones * ones
        step = (total * products - moment * ones) / determinant
        ground = (squares * moment - ones * products) / determinant
        above = ground > ZERO
        step = choose(above, products / squares, step)
        ground = choose(above, every(ZERO), ground)
        error = _affine_error(x, weight, trial, step, ground, absolute)
        better = (determinant > ZERO) & (error < least)
        least = choose(better, error, least)
        inverse = choose(better, tried, inverse)
        base = choose(better, low, base)
        scale = choose(better, step, scale)
        low = choose(better, ground, low)
    scale = choose(curved, scale, every(ZERO))
    inverse = choose(curved, inverse, every(ZERO))
    return scale, low * np.float32(-1.0), inverse, base


@jit
def _signed_sums(x, weight, inverse, half):  # type: ignore[no-untyped-def]
    product = every(ZERO)
    square = every(ZERO)
    for i in range(x.shape[0]):
        value = load(x, i)
        counted = load(weight, i)
        code = bounded(nearest(inverse * value), -half, half - ONE)
        product = product + counted * value * code
        square = square + counted * code * code
    return product, square


@jit
def signed_fit(x, weight, half):  # type: ignore[no-untyped-def]
    """Scale as `ops.block_search.signed_fit` finds it, and the inverse that gives its codes, stored as code + half:

        code = bounded(nearest(inverse * x), -half, half - 1)

    half      float32
    returns   scale, inverse, edge: where edge is below EMPTY in magnitude, the block counts as zero, its stored code 0
    """
    edge = largest_in(x)
    inverse = every(-half) / edge
    product, square = _signed_sums(x, weight, inverse, half)
    scale = choose(square != ZERO, product / square, every(ZERO))
    best = scale * product
    for k in range(-SIGNED_TRIALS, SIGNED_TRIALS + 1):
        if k == 0:
            continue
        tried = every(-(half + TENTH * np.float32(k))) / edge
        product, square = _signed_sums(x, weight, tried, half)
        better = (square > ZERO) & (product * product > best * square)
        fitted = product / square
        scale = choose(better, fitted, scale)
        best = choose(better, fitted * product, best)
        inverse = choose(better, tried, inverse)
    return choose(magnitude(edge) < NOTHING, every(ZERO), scale), inverse, edge


@jit
def _swept(x, weight, codes, product, square, low, high, everywhere):  # type: ignore[no-untyped-def]
    """Coordinate descent, see `ops.block_search.signed_descent`. everywhere: codes may move where little is left."""
    for _ in range(SWEEPS):
        changed = every(ZERO)
        for i in range(x.shape[0]):
            value = load(x, i)
            counted = load(weight, i)
            code = load(codes, i)
            without = product - counted * value * code
            rest = square - counted * code * code
            moved = bounded(wrapped(value * rest / without), low, high)
            ahead = without + counted * value * moved
            power = rest + counted * moved * moved
            better = (without > ZERO) & (moved != code) & ((power if everywhere else rest) > ZERO)
            better = better & (ahead * ahead * square > product * product * power)
            store(codes, i, choose(better, moved, code))
            product = choose(better, ahead, product)
            square = choose(better, power, square)
            changed = choose(better, every(ONE), changed)
        if none(changed > ZERO):
            break
    return choose(square > ZERO, product / square, every(ZERO))


@jit
def signed_descent(x, weight, codes, half):  # type: ignore[no-untyped-def]
    """`ops.block_search.signed_descent`. weight is x^2. codes [n, 16], filled: without half added.

    returns   scale, edge
    """
    edge = largest_in(x)
    inverse = every(-half) / edge
    product = every(ZERO)
    square = every(ZERO)
    for i in range(x.shape[0]):
        value = load(x, i)
        counted = load(weight, i)
        code = bounded(nearest(inverse * value), -half, half - ONE)
        store(codes, i, code)
        product = product + counted * value * code
        square = square + counted * code * code
    scale = _swept(x, weight, codes, product, square, -half, half - ONE, True)
    return choose(magnitude(edge) < NOTHING, every(ZERO), scale), edge


@jit
def _positive_error(x, weight, inverse, largest):  # type: ignore[no-untyped-def]
    scale = every(ONE) / inverse
    error = every(ZERO)
    for i in range(x.shape[0]):
        value = load(x, i)
        code = nearest(inverse * value)
        rest = value - scale * choose(code < largest, code, largest)
        error = error + load(weight, i) * rest * rest
    return error


@jit
def positive_fit(x, weight, codes, largest):  # type: ignore[no-untyped-def]
    """`ops.block_search.positive_fit`. codes [n, 16], filled. returns scale"""
    high = every(ZERO)
    for i in range(x.shape[0]):
        high = largest_of(load(x, i), high)
    inverse = every(largest) / high
    least = _positive_error(x, weight, inverse, largest)
    for k in range(-POSITIVE_TRIALS, POSITIVE_TRIALS + 1):
        if k == 0:
            continue
        tried = every(TENTH * np.float32(k) + largest) / high
        error = _positive_error(x, weight, tried, largest)
        inverse = choose(error < least, tried, inverse)
        least = choose(error < least, error, least)
    product = every(ZERO)
    square = every(ZERO)
    for i in range(x.shape[0]):
        value = load(x, i)
        counted = load(weight, i)
        code = nearest(inverse * value)
        code = choose(code < largest, code, largest)
        store(codes, i, code)
        product = product + counted * value * code
        square = square + counted * code * code
    scale = _swept(x, weight, codes, product, square, LOWEST, largest, False)
    empty = high < NOTHING
    for i in range(x.shape[0]):
        store(codes, i, choose(empty, every(ZERO), load(codes, i)))
    return choose(empty, every(ZERO), scale)


@jit
def entry_of(values, middles, entries):  # type: ignore[no-untyped-def]
    """The index of the nearest entry of a table, as float32; of two as near, the upper.

    middles, entries   [n - 1] float32: sums of neighbouring entries; 1 for the index, or their differences for values
    """
    doubled = values + values
    found = every(ZERO)
    for k in range(len(middles)):
        found = choose(doubled >= middles[k], found + entries[k], found)
    return found


@jit
def _table_sums(x, weight, inverse, middles, gaps, lowest):  # type: ignore[no-untyped-def]
    product = every(ZERO)
    square = every(ZERO)
    for i in range(x.shape[0]):
        here = load(x, i)
        value = entry_of(inverse * here, middles, gaps) + lowest
        counted = load(weight, i) * value
        product = product + counted * here
        square = square + counted * value
    return product, square


@jit
def table_fit(x, weight, middles, gaps, lowest):  # type: ignore[no-untyped-def]
    """`ops.block_search.table_fit`. middles, gaps: see `entry_of`; lowest: the first entry. returns scale"""
    edge = largest_in(x)
    product, square = _table_sums(x, weight, every(ONE) / (edge * np.float32(-1.0) / lowest), middles, gaps, lowest)
    scale = choose(square > ZERO, product / square, every(ZERO))
    best = scale * product
    for k in range(-TABLE_TRIALS, TABLE_TRIALS + 1):
        product, square = _table_sums(x, weight, every(np.float32(k) + lowest) / edge, middles, gaps, lowest)
        better = (square > ZERO) & (product * product > best * square)
        fitted = product / square
        scale = choose(better, fitted, scale)
        best = choose(better, fitted * product, best)
    return choose(magnitude(edge) < NOTHING, every(ZERO), scale)
