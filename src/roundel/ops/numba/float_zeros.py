"""`ops.half_quadratic` where zero points are floats, in numba, block after block.

Powers and tolerances are those of `half_quadratic.py` beside this.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from roundel.ops.encode import encode
from roundel.ops.half_quadratic import Splitting
from roundel.ops.numba.compiling import jit, summing
from roundel.ops.numba.half_quadratic import (
    INFINITE,
    LARGEST_HALF,
    LESS,
    ONE,
    ZERO,
    norm_of,
    scratch,
    share_slabs,
    shrunk_sums,
)
from roundel.ops.numba.integer_search import as_stored
from roundel.ops.search import Searched
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, plain

__all__ = ["solve_floats"]

SMALLEST_HALF = np.float32(2.0**-14)  # that is normal


def solve_floats(weight: Tensor, grid: Grid, how: Splitting, threads: int = 1) -> Searched:
    """`ops.half_quadratic.solve` by kernel, for weights on the CPU and a grid with float zero points."""
    plainly = encode(weight, grid)
    assert plainly.zero is not None
    group = grid.block_of(plainly.shape)[1]
    codes, scales, zeros = plainly.codes.numpy(), plain(plainly.scale).numpy(), plainly.zero.float().numpy()
    constants = np.array([how.norm, how.beta, how.kappa, how.untouched], np.float32)

    def work(stored: np.ndarray, at: slice, sums: np.ndarray) -> None:
        solve_blocks(
            stored, group, grid.element.bits, how.iterations, constants, codes[at], scales[at], zeros[at], sums
        )

    error, baseline = share_slabs(work, weight, threads)
    found = QuantizedTensor(
        grid=grid,
        codes=plainly.codes,
        scale=torch.from_numpy(scales).half(),
        zero=torch.from_numpy(zeros).half(),
    )
    return Searched(tensor=found, error=error, baseline=baseline)


@summing
def _round(weight, step, zero, largest, codes, rest, size):  # type: ignore[no-untyped-def]
    """Fills codes, w - (codes - zero) * step and its size; returns the largest size and the sums of codes, codes^2, w,
    w * codes."""
    inverse = ONE / step
    biggest = ZERO
    first = ZERO
    square = ZERO
    total = ZERO
    inner = ZERO
    for i in range(len(weight)):
        code = min(max(np.rint(weight[i] * inverse + zero), ZERO), largest)
        codes[i] = code
        rest[i] = weight[i] - (code - zero) * step
        size[i] = abs(rest[i])
        biggest = max(biggest, size[i])
        first += code
        square += code * code
        total += weight[i]
        inner += weight[i] * code
    return biggest, first, square, total, inner


@summing
def _stored_error(weight, scale, zero, largest, size, bits, exponent, norm):  # type: ignore[no-untyped-def]
    """The norm of what is lost with a scale and a zero point as they are stored."""
    for i in range(len(weight)):
        code = min(max(np.rint(weight[i] / scale + zero), ZERO), largest)
        size[i] = abs(weight[i] - (code - zero) * scale)
    return norm_of(size, bits, exponent, len(weight), norm)


@jit
def _as_half(zero, bits, floats):  # type: ignore[no-untyped-def]
    """The nearest float16; 0 where that is no normal one. bits and floats share memory."""
    floats[0] = abs(zero)
    if not floats[0] >= SMALLEST_HALF:
        return ZERO
    bits[0] = (bits[0] + np.uint32(0xFFF) + ((bits[0] >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    found = min(floats[0], LARGEST_HALF)
    return found if zero > ZERO else -found


@jit
def solve_blocks(stored, group, bits, iterations, constants, codes, scales, zeros, sums):  # type: ignore[no-untyped-def]
    """Improve plain rounding of rows of weights [rows, in] float32.

    constants   norm, beta, kappa, and the size up to which errors never count as large, float32
    codes       [rows, in] uint8; scales, zeros [rows, groups] float32 that float16 holds: plain rounding's, replaced
                where better are found
    sums        [2] float64, added to: the norm found, and plain rounding's
    """
    rows, width = stored.shape
    norm, beta0, kappa, untouched = constants[0], constants[1], constants[2], constants[3]
    one_bits, one_float, whole, rest, size, size_bits, exponent = scratch(group)
    largest = np.float32((1 << bits) - 1)
    for row in range(rows):
        for block in range((width + group - 1) // group):
            begin = block * group
            end = min(begin + group, width)
            weight = stored[row, begin:end]
            count = np.float32(end - begin)
            step, zero = scales[row, block], zeros[row, block]
            baseline = _stored_error(weight, step, zero, largest, size, size_bits, exponent, norm)
            sums[1] += np.float64(baseline)
            if not step <= LARGEST_HALF:
                sums[0] += np.float64(baseline)
                continue
            kept, kept_zero, least, beta = step, zero, INFINITE, beta0
            for _ in range(iterations + 1):
                biggest, first, square, total, inner = _round(weight, step, zero, largest, whole, rest, size)
                if biggest > untouched:
                    taken, met = shrunk_sums(size, rest, whole, end - begin, norm, beta)
                    total -= taken
                    inner -= met
                error = norm_of(size, size_bits, exponent, end - begin, norm)
                if error < LESS * least:
                    least, kept, kept_zero = error, step, zero
                beta = np.float32(beta * kappa)
                before, zero_before = step, zero
                spread = square - first * first / count
                together = inner - first * total / count
                if spread > ZERO and together > ZERO:
                    step = np.float32(together / spread)
                step = as_stored(step, one_bits, one_float)
                zero = _as_half((first - total / step) / count, one_bits, one_float)
                if step == before and zero == zero_before and biggest <= untouched:
                    break  # nothing would change any more
            found = _stored_error(weight, kept, kept_zero, largest, size, size_bits, exponent, norm)
            if not found < LESS * baseline:
                sums[0] += np.float64(baseline)
                continue
            sums[0] += np.float64(found)
            scales[row, block], zeros[row, block] = kept, kept_zero
            for i in range(end - begin):
                codes[row, begin + i] = np.uint8(min(max(np.rint(weight[i] / kept + kept_zero), ZERO), largest))
