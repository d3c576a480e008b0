"""`ops.search` in numba: the same trials, block after block, so that a block's weights stay in the nearest cache.

Sums run in several lanes, so that their last bits are not the definition's, and now and then, of two trials that are as
good, the other one is refined. Up to 4 bits that hardly ever happens; in general the error of a matrix agrees within
1e-6 of itself and 1e-7 of the weights' own square. What is stored is judged in float64 here as there. One core of an
EPYC 7003 at 2.45 GHz searches, in millions of weights a second (benchmarks/search.py): W4G128 symmetric 34, asymmetric
24; W2G32 symmetric 24, asymmetric 14; MXFP4 34.

Threads take rows. They are not numba's own: its pool cannot be entered by several workers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from roundel.ops.encode import encode, encode_scaled
from roundel.ops.search import (
    BETTER,
    NEIGHBOURS,
    REFINEMENTS,
    SHARE,
    Searched,
    chosen_scales,
    float_scales,
    ladder,
    rows_of,
)
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, plain

__all__ = ["as_stored", "search_tensor"]

SLAB = 1 << 18  # weights that a thread holds as float32
HALF = np.float32(0.5)
ZERO, ONE, TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
INFINITE = np.float32(np.inf)
LEAST_SHARE = np.float32(SHARE)
SMALLEST = np.float32(1.0013580322265625e-05)  # 1e-5 in float16
LARGEST_HALF = np.float32(65504.0)
TINY = np.float32(np.finfo(np.float32).tiny)
NARROWEST = np.float32(1e-6)
LESS = np.float32(BETTER)
WIDER = np.float32(NEIGHBOURS)

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)
# Sums may be taken in any order; weights and steps are finite.
_sums = numba.njit(
    cache=True, nogil=True, error_model="numpy", boundscheck=False, fastmath={"reassoc", "nsz", "contract", "nnan"}
)


def search_tensor(
    weight: Tensor, grid: Grid, importance: Tensor | None, threads: int = 1, reach: float | None = None
) -> Searched:
    """`ops.search.search` by kernel, for weights on the CPU."""
    plainly = encode(weight, grid, reach)
    width = weight.shape[1]
    counted = np.ones(width, np.float32) if importance is None else importance.float().contiguous().numpy()
    rows = max(1, SLAB // width)
    slabs = [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]
    work, result = (_integers if grid.element.is_integer else _floats)(weight, plainly, counted)
    if threads > 1 and len(slabs) > 1:
        with ThreadPoolExecutor(threads, thread_name_prefix="search") as pool:
            sums = list(pool.map(work, slabs))
    else:
        sums = [work(slab) for slab in slabs]
    error, baseline = (sum(float(pair[i]) for pair in sums) for i in (0, 1))
    return Searched(tensor=result(), error=error, baseline=baseline)


Work = Callable[[slice], np.ndarray]
Result = Callable[[], QuantizedTensor]


def _rows(weight: Tensor, slab: slice) -> np.ndarray:
    found: np.ndarray = weight[slab].float().contiguous().numpy()
    return found


def _integers(weight: Tensor, plainly: QuantizedTensor, counted: np.ndarray) -> tuple[Work, Result]:
    """What is done to a slab of rows, and what it comes to in the end: plain rounding's arrays are improved in
    place."""
    grid, group = plainly.grid, plainly.grid.block_of(plainly.shape)[1]
    rungs = ladder(grid.element.bits)
    codes, scales = plainly.codes.numpy().view(np.uint8), plain(plainly.scale).numpy()
    zero = plainly.zero
    zeros = np.zeros(scales.shape, np.uint8) if zero is None else zero.numpy()

    def work(slab: slice) -> np.ndarray:
        sums = np.zeros(2)
        fixed = (grid.element.bits, grid.symmetric, grid.lowest_zero, rungs.count, rungs.widest, rungs.finest)
        rows = _rows(weight, slab)
        search_integer(rows, counted, group, *fixed, codes[slab], scales[slab], zeros[slab], sums)
        return sums

    def result() -> QuantizedTensor:
        return QuantizedTensor(grid=grid, codes=plainly.codes, scale=torch.from_numpy(scales).half(), zero=zero)

    return work, result


def _floats(weight: Tensor, plainly: QuantizedTensor, counted: np.ndarray) -> tuple[Work, Result]:
    grid, group = plainly.grid, plainly.grid.block_of(plainly.shape)[1]
    tried = float_scales(plainly)
    steps = np.stack([plain(each).numpy() for each in tried])
    index = np.zeros(steps.shape[1:], np.uint8)
    codes = plainly.codes
    mantissa, smallest = (1, 1.0) if grid.element.name == "e2m1" else (3, 2.0**-6)
    bounds = np.uint32(mantissa << 23), np.float32(smallest).view(np.uint32), np.float32(grid.element.hi)

    def work(slab: slice) -> np.ndarray:
        sums, here = np.zeros(2), np.ascontiguousarray(steps[:, slab])
        search_floats(_rows(weight, slab), counted, group, *bounds, here, index[slab], sums)
        chosen = chosen_scales([rows_of(each, slab) for each in tried], torch.from_numpy(index[slab]))
        codes[slab] = encode_scaled(weight[slab], grid, chosen).codes
        return sums

    def result() -> QuantizedTensor:
        return QuantizedTensor(grid=grid, codes=codes, scale=chosen_scales(tried, torch.from_numpy(index)))

    return work, result


@_sums
def _trial(weight, importance, step, low, high):  # type: ignore[no-untyped-def]
    """(E, C) of a step, its codes between low and high."""
    error = ZERO
    slope = ZERO
    inverse = ONE / step
    for i in range(len(weight)):
        code = min(max(np.rint(weight[i] * inverse), low), high)
        rest = weight[i] - code * step
        counted = importance[i] * rest
        error += counted * rest
        slope += counted * code
    return error, slope


@_sums
def _trial_pair(weight, importance, step, low, high):  # type: ignore[no-untyped-def]
    """(E, C) of a step with codes between low and high, and with codes between -high and -low."""
    error = ZERO
    slope = ZERO
    error_turned = ZERO
    slope_turned = ZERO
    inverse = ONE / step
    for i in range(len(weight)):
        whole = np.rint(weight[i] * inverse)
        code = min(max(whole, low), high)
        rest = weight[i] - code * step
        counted = importance[i] * rest
        error += counted * rest
        slope += counted * code
        code = min(max(whole, -high), -low)
        rest = weight[i] - code * step
        counted = importance[i] * rest
        error_turned += counted * rest
        slope_turned += counted * code
    return error, slope, error_turned, slope_turned


@_jit
def _fitted(error, slope, step, energy):  # type: ignore[no-untyped-def]
    """(the error with the codes' least-squares step, that step)."""
    held = energy - TWO * step * slope - error
    if held > LEAST_SHARE * energy:
        change = slope / held * step
        return error - change * slope * step, step + change * step
    return error, step


@_jit
def _stored_error(weight, importance, scale, shift, low, high):  # type: ignore[no-untyped-def]
    """The error in float64, as what is stored will be decoded. Codes: round(w / scale) + shift from low to high."""
    total = 0.0
    for i in range(len(weight)):
        code = min(max(np.rint(weight[i] / scale) + shift, low), high) - shift
        value = np.float32(code * scale)
        rest = np.float64(weight[i]) - np.float64(value)
        total += np.float64(importance[i]) * rest * rest
    return total


@_jit
def as_stored(step, bits, floats):  # type: ignore[no-untyped-def]
    """The nearest positive float16 step that can be stored; bits and floats share memory."""
    floats[0] = min(step, LARGEST_HALF)
    if floats[0] < np.float32(6.103515625e-05):  # a subnormal: a whole number of 2^-24
        floats[0] = (floats[0] + np.float32(0.75)) - np.float32(0.75)
    else:
        bits[0] = (bits[0] + np.uint32(0xFFF) + ((bits[0] >> np.uint32(13)) & ONE_BIT)) & np.uint32(0xFFFFE000)
    return max(min(floats[0], LARGEST_HALF), SMALLEST)


ONE_BIT = np.uint32(1)


@_jit
def _statistics(weight, importance):  # type: ignore[no-untyped-def]
    """(largest, magnitude of the most negative, sum of i, of i * w, of i * w^2)."""
    high = ZERO
    low = ZERO
    total = ZERO
    first = ZERO
    second = ZERO
    for i in range(len(weight)):
        high = max(high, weight[i])
        low = max(low, -weight[i])
        total += importance[i]
        first += importance[i] * weight[i]
        second += importance[i] * weight[i] * weight[i]
    return high, low, total, first, second


@_jit
def search_integer(  # type: ignore[no-untyped-def]
    stored, counted, group, bits, symmetric, lowest_zero, count, widest, finest, codes, scales, zeros, sums
):
    """Improve plain rounding of rows of weights.

    stored    [rows, in] float32
    counted   [in] float32, the importance
    count, widest, finest   the ladder of `ops.search`
    codes     [rows, in] uint8, or the bits of int8 where symmetric; scales [rows, groups] float32; zeros
              [rows, groups] uint8 (not read where symmetric): plain rounding's, replaced where a better scale is found
    sums      [2] float64, added to: the error found, and plain rounding's
    """
    rows, width = stored.shape
    one_bits = np.empty(1, dtype=np.uint32)
    one_float = one_bits.view(np.float32)
    alike = np.ones(group, dtype=np.float32)
    largest = np.float32((1 << bits) - 1)
    half = np.float32(1 << (bits - 1))
    lowest = np.float32(lowest_zero)
    centre = HALF * largest
    base = -half if symmetric else ZERO
    for row in range(rows):
        for block in range((width + group - 1) // group):
            begin = block * group
            end = min(begin + group, width)
            weight = stored[row, begin:end]
            importance = counted[begin:end]
            high, low, total, first, energy = _statistics(weight, importance)
            if total <= ZERO:
                importance = alike[: end - begin]
                high, low, total, first, energy = _statistics(weight, importance)
            scale = scales[row, block]
            shift = ZERO if symmetric else np.float32(zeros[row, block])
            baseline = _stored_error(weight, importance, scale, shift, base, base + largest)
            spanning = max(high, low) / half if symmetric else (high + low) / largest
            if not (spanning > ZERO and abs(scale) <= LARGEST_HALF):
                sums += baseline
                continue
            spanning = max(spanning, TINY)
            power = energy / total
            if not symmetric:
                mean = first / total
                power = max(power - mean * mean, power / np.float32(9.0))
            widest_step = spanning * np.float32(widest)
            finest_step = min(np.float32(finest) * np.sqrt(power), np.float32(0.8) * spanning)
            ratio = np.float32(max(finest_step / widest_step, NARROWEST) ** np.float32(1.0 / (count - 1)))
            best = INFINITE
            best_step = widest_step
            best_trial = widest_step
            best_zero = half
            zero = min(max(np.rint(low / widest_step), lowest), largest)
            step = widest_step
            for again in range(2):
                if again == 1:
                    step = np.float32(best_trial * ratio**-WIDER)
                    ratio = np.float32(ratio ** np.float32(TWO * WIDER / np.float32(count - 1)))
                    zero = best_zero
                for _ in range(count):
                    if symmetric:
                        error, slope, turned, slope_turned = _trial_pair(weight, importance, step, -half, half - ONE)
                        score, fitted = _fitted(error, slope, step, energy)
                        if score < LESS * best:
                            best, best_step, best_trial, best_zero = score, fitted, step, half
                        score, fitted = _fitted(turned, slope_turned, step, energy)
                        if score < LESS * best:
                            best, best_step, best_trial, best_zero = score, fitted, step, half - ONE
                        step = np.float32(step * ratio)
                        continue
                    error, slope = _trial(weight, importance, step, -zero, largest - zero)
                    score, fitted = _fitted(error, slope, step, energy)
                    if score < LESS * best:
                        best, best_step, best_trial, best_zero = score, fitted, step, zero
                    start = zero
                    for turn in range(2):
                        if zero != start:  # went up
                            break
                        ahead = zero + ONE if turn == 0 else zero - ONE
                        while lowest <= ahead <= largest:
                            reached = np.rint(low / step) - zero if turn == 0 else np.rint(high / step) - largest + zero
                            if reached <= ZERO:
                                break
                            tried, slope = _trial(weight, importance, step, -ahead, largest - ahead)
                            score, fitted = _fitted(tried, slope, step, energy)
                            if score < LESS * best:
                                best, best_step, best_trial, best_zero = score, fitted, step, ahead
                            if tried >= error:
                                break
                            error = tried
                            zero = ahead
                            ahead = zero + ONE if turn == 0 else zero - ONE
                    narrowed = np.float32(step * ratio)
                    zero = min(max(np.rint(centre - (centre - zero) * (step / narrowed)), lowest), largest)
                    step = narrowed
            least = INFINITE
            kept = scale
            step = as_stored(best_step, one_bits, one_float)
            for _ in range(REFINEMENTS):
                error, slope = _trial(weight, importance, step, -best_zero, largest - best_zero)
                if error < least:
                    least = error
                    kept = step
                score, fitted = _fitted(error, slope, step, energy)
                step = as_stored(fitted, one_bits, one_float)
            if symmetric:
                if best_zero != half:
                    kept = -kept
                best_zero = ZERO
            error64 = _stored_error(weight, importance, kept, best_zero, base, base + largest)
            sums[1] += baseline
            sums[0] += min(error64, baseline)
            if error64 < baseline:
                scales[row, block] = kept
                if not symmetric:
                    zeros[row, block] = np.uint8(best_zero)
                for i in range(end - begin):
                    code = min(max(np.rint(weight[i] / kept) + best_zero, base), base + largest)
                    codes[row, begin + i] = np.uint8(np.int32(code))


@_jit
def search_floats(stored, counted, group, mantissa, smallest, largest, steps, index, sums):  # type: ignore[no-untyped-def]
    """Which of several scales is best for each block of floats.

    stored     [rows, in] float32
    counted    [in] float32, the importance
    mantissa, smallest   fraction bits of the element << 23, float32 bits of its smallest normal value
    largest    value of the element
    steps      [trials, rows, groups] float32, at least 0
    index      [rows, groups] uint8, filled
    sums       [2] float64, added to: the error of the best, and of trial 0
    """
    rows, width = stored.shape
    alike = np.ones(group, dtype=np.float32)
    scratch = np.empty((3, group), dtype=np.uint32)
    for row in range(rows):
        for block in range((width + group - 1) // group):
            begin = block * group
            end = min(begin + group, width)
            importance = counted[begin:end]
            if importance.max() <= ZERO:
                importance = alike[: end - begin]
            best = np.inf
            for trial in range(len(steps)):
                step = steps[trial, row, block]
                error = _float_error(stored[row, begin:end], importance, step, mantissa, smallest, largest, scratch)
                if trial == 0:
                    sums[1] += error
                if error < best:
                    best = error
                    index[row, block] = np.uint8(trial)
            sums[0] += best


@_sums
def _float_error(weight, importance, step, mantissa, smallest, largest, scratch):  # type: ignore[no-untyped-def]
    """The error of one block of floats with a scale, in float64. scratch: [3, n] uint32."""
    n = len(weight)
    bits = scratch[0]
    size = bits.view(np.float32)
    quantum_bits = scratch[1]
    quantum = quantum_bits.view(np.float32)
    inverse_bits = scratch[2]
    inverse_quantum = inverse_bits.view(np.float32)
    inverse = ZERO if step == ZERO else ONE / step
    for i in range(n):
        size[i] = min(abs(weight[i]) * inverse, largest)
    for i in range(n):  # the step of the element's grid where the value lies, a power of two, and one over it
        exponent = (max(bits[i], smallest) & np.uint32(0x7F800000)) - mantissa
        quantum_bits[i] = exponent
        inverse_bits[i] = np.uint32(0x7F000000) - exponent
    error = 0.0
    for i in range(n):
        value = np.rint(size[i] * inverse_quantum[i]) * quantum[i] * step
        rest = np.float64(abs(weight[i])) - np.float64(value)
        error += np.float64(importance[i]) * rest * rest
    return error
