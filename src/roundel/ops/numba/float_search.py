"""`ops.float_search` in numba: every trial of a block while its weights are in the nearest cache."""

from __future__ import annotations

import numpy as np

from roundel.ops.numba.compiling import jit, summing

__all__ = ["search_floats"]

ZERO, ONE = np.float32(0.0), np.float32(1.0)


@summing
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


@jit
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
