"""`ops.integer_search` in numba: the same trials, block after block, weights in the nearest cache all the while.

Sums run in several lanes, so that their last bits are not the definition's, and now and then, of two trials that are as
good, the other one is refined. Up to 4 bits that hardly ever happens.
"""

from __future__ import annotations

import numpy as np

from roundel.ops.integer_search import BETTER, NEIGHBOURS, REFINEMENTS, SHARE
from roundel.ops.numba.compiling import jit, summing

__all__ = ["as_stored", "search_integer"]

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
ONE_BIT = np.uint32(1)


@summing
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


@summing
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


@jit
def _fitted(error, slope, step, energy):  # type: ignore[no-untyped-def]
    """(the error with the codes' least-squares step, that step)."""
    held = energy - TWO * step * slope - error
    if held > LEAST_SHARE * energy:
        change = slope / held * step
        return error - change * slope * step, step + change * step
    return error, step


@jit
def _stored_error(weight, importance, scale, shift, low, high):  # type: ignore[no-untyped-def]
    """The error in float64, as what is stored will be decoded. Codes: round(w / scale) + shift from low to high."""
    total = 0.0
    for i in range(len(weight)):
        code = min(max(np.rint(weight[i] / scale) + shift, low), high) - shift
        value = np.float32(code * scale)
        rest = np.float64(weight[i]) - np.float64(value)
        total += np.float64(importance[i]) * rest * rest
    return total


@jit
def as_stored(step, bits, floats):  # type: ignore[no-untyped-def]
    """The nearest positive float16 step that can be stored; bits and floats share memory."""
    floats[0] = min(step, LARGEST_HALF)
    if floats[0] < np.float32(6.103515625e-05):  # a subnormal: a whole number of 2^-24
        floats[0] = (floats[0] + np.float32(0.75)) - np.float32(0.75)
    else:
        bits[0] = (bits[0] + np.uint32(0xFFF) + ((bits[0] >> np.uint32(13)) & ONE_BIT)) & np.uint32(0xFFFFE000)
    return max(min(floats[0], LARGEST_HALF), SMALLEST)


@jit
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


@jit
def search_integer(  # type: ignore[no-untyped-def]
    stored, counted, group, bits, symmetric, lowest_zero, count, widest, finest, codes, scales, zeros, sums
):
    """Improve plain rounding of rows of weights.

    stored    [rows, in] float32
    counted   [in] float32, the importance
    count, widest, finest   the ladder of `ops.integer_search`
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
