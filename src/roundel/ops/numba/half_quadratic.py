"""`ops.half_quadratic` in numba, block after block.

|r|^p is 2^(p log2 |r|) by two polynomials, within 1e-6 of itself; powers from the mathematical library would take most
of the time. Errors that are reported are within 1e-5; where two iterations are as good, the one that is kept may not be
the definition's, and the norm of a matrix agrees within 1e-4, on weights that are whole multiples within 1e-3. No block
is worse than plain rounding here either: it must be better by more than the powers are off. One core of an EPYC 7003 at
2.45 GHz solves 54 million weights a second at W4G128 symmetric, 35 asymmetric (benchmarks/search.py); the definition
1.4.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from roundel.ops.encode import encode
from roundel.ops.half_quadratic import BETTER, Splitting
from roundel.ops.numba.compiling import jit, summing
from roundel.ops.numba.integer_search import as_stored
from roundel.ops.search import Searched
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, plain

__all__ = [
    "INFINITE",
    "LARGEST_HALF",
    "LESS",
    "ONE",
    "ZERO",
    "norm_of",
    "power",
    "scratch",
    "share_slabs",
    "shrunk_sums",
    "solve_tensor",
]

SLAB = 1 << 18  # weights that a thread holds as float32
ZERO, ONE, TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
INFINITE = np.float32(np.inf)
LARGEST_HALF = np.float32(65504.0)
LESS = np.float32(BETTER)
# log2(1 + t) / t for t of sqrt(1/2) - 1 to sqrt(2) - 1, and 2^t for t of -1/2 to 1/2; Chebyshev interpolation
LOGARITHM = np.array(
    [1.4426950, -0.72134745, 0.48091075, -0.36069328, 0.28790325, -0.23916988, 0.21607822, -0.20586188, 0.12310968],
    dtype=np.float32,
)
EXPONENTIAL = np.array([1.0000001, 0.69314718, 0.24022107, 0.05550357, 0.009676032, 0.0013390863], dtype=np.float32)
ROOT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2)


def solve_tensor(weight: Tensor, grid: Grid, how: Splitting, threads: int = 1) -> Searched:
    """`ops.half_quadratic.solve` by kernel, for weights on the CPU."""
    plainly = encode(weight, grid)
    group = grid.block_of(plainly.shape)[1]
    codes, scales = plainly.codes.numpy().view(np.uint8), plain(plainly.scale).numpy()
    zero = plainly.zero
    zeros = np.zeros(scales.shape, np.uint8) if zero is None else zero.numpy()
    constants = np.array([how.norm, how.beta, how.kappa, how.untouched], np.float32)

    def work(stored: np.ndarray, at: slice, sums: np.ndarray) -> None:
        fixed = (grid.element.bits, grid.symmetric, grid.lowest_zero, how.iterations, constants)
        solve_blocks(stored, group, *fixed, codes[at], scales[at], zeros[at], sums)

    error, baseline = share_slabs(work, weight, threads)
    found = QuantizedTensor(grid=grid, codes=plainly.codes, scale=torch.from_numpy(scales).half(), zero=zero)
    return Searched(tensor=found, error=error, baseline=baseline)


def share_slabs(
    work: Callable[[np.ndarray, slice, np.ndarray], None], weight: Tensor, threads: int
) -> tuple[float, float]:
    """Run work(rows as float32, which they are, [2] sums to add to) over slabs of a matrix; the sums of all."""

    def one(start: int) -> np.ndarray:
        at, sums = slice(start, start + rows), np.zeros(2)
        work(weight[at].float().contiguous().numpy(), at, sums)
        return sums

    out, width = weight.shape
    rows = max(1, SLAB // width)
    starts = range(0, out, rows)
    if threads > 1 and len(starts) > 1:
        with ThreadPoolExecutor(threads, thread_name_prefix="solve") as pool:
            sums = list(pool.map(one, starts))
    else:
        sums = [one(start) for start in starts]
    return sum(float(pair[0]) for pair in sums), sum(float(pair[1]) for pair in sums)


def power(sizes: np.ndarray, norm: float) -> float:
    """sum sizes^norm as the kernel takes it, for numbers of at least 0 [n] float32."""
    scratch = sizes.astype(np.float32)
    return float(norm_of(scratch, scratch.view(np.int32), np.empty_like(scratch), len(sizes), np.float32(norm)))


@summing
def norm_of(size, bits, exponent, n, norm):  # type: ignore[no-untyped-def]
    """sum size^norm of n numbers, which are used up; bits shares their memory, exponent is scratch."""
    for i in range(n):
        whole = (bits[i] - ROOT_HALF) >> np.int32(23)
        bits[i] = bits[i] - (whole << np.int32(23))
        exponent[i] = np.float32(whole)
    for i in range(n):
        t = size[i] - ONE
        found = LOGARITHM[8]
        for j in range(7, -1, -1):
            found = found * t + LOGARITHM[j]
        exponent[i] = (exponent[i] + found * t) * norm
    for i in range(n):
        bits[i] = (np.int32(np.rint(exponent[i])) + np.int32(127)) << np.int32(23)
    total = ZERO
    for i in range(n):
        t = exponent[i] - np.rint(exponent[i])
        found = EXPONENTIAL[5]
        for j in range(4, -1, -1):
            found = found * t + EXPONENTIAL[j]
        total += size[i] * found
    return total


@summing
def _round(weight, step, low, high, codes, rest, size):  # type: ignore[no-untyped-def]
    """Fills codes, w - codes * step and its size; returns the largest size and the sums least squares needs, of which
    the target is w: (sum codes, sum codes^2, sum w, sum w * codes)."""
    inverse = ONE / step
    largest = ZERO
    first = ZERO
    square = ZERO
    total = ZERO
    inner = ZERO
    for i in range(len(weight)):
        code = min(max(np.rint(weight[i] * inverse), low), high)
        codes[i] = code
        rest[i] = weight[i] - code * step
        size[i] = abs(rest[i])
        largest = max(largest, size[i])
        first += code
        square += code * code
        total += weight[i]
        inner += weight[i] * code
    return largest, first, square, total, inner


@summing
def _stored_error(weight, scale, shift, low, high, size, bits, exponent, norm):  # type: ignore[no-untyped-def]
    """The norm of what is lost with a scale as it is stored. Codes: round(w / scale) + shift from low to high."""
    for i in range(len(weight)):
        code = min(max(np.rint(weight[i] / scale) + shift, low), high) - shift
        size[i] = abs(weight[i] - code * scale)
    return norm_of(size, bits, exponent, len(weight), norm)


@jit
def scratch(group):  # type: ignore[no-untyped-def]
    """What solving a block needs: one number as bits and as a float, codes, rests, sizes as floats and as bits, and
    `norm_of`'s exponents."""
    one = np.empty(1, dtype=np.uint32)
    size = np.empty(group, dtype=np.float32)
    whole = np.empty(group, dtype=np.float32)
    rest = np.empty(group, dtype=np.float32)
    exponent = np.empty(group, dtype=np.float32)
    return one, one.view(np.float32), whole, rest, size, size.view(np.int32), exponent


@jit
def shrunk_sums(size, rest, whole, n, norm, beta):  # type: ignore[no-untyped-def]
    """Of n errors as they are shrunk: their sum, and that of their products by the codes."""
    total = ZERO
    inner = ZERO
    for i in range(n):
        shrunk = size[i] - max(size[i], np.float32(1e-30)) ** (norm - ONE) / beta
        if shrunk > ZERO:
            taken = shrunk if rest[i] > ZERO else -shrunk
            total += taken
            inner += taken * whole[i]
    return total, inner


@jit
def _better_step(product, square, step, one_bits, one_float):  # type: ignore[no-untyped-def]
    """product / square as it can be stored; the step as it was where that is none."""
    if square > ZERO and product > ZERO:
        step = np.float32(product / square)
    return as_stored(step, one_bits, one_float)


@jit
def solve_blocks(  # type: ignore[no-untyped-def]
    stored, group, bits, symmetric, lowest_zero, iterations, constants, codes, scales, zeros, sums
):
    """Improve plain rounding of rows of weights [rows, in] float32.

    constants   norm, beta, kappa, and the size up to which errors never count as large, float32
    codes       [rows, in] uint8, or the bits of int8 where symmetric; scales [rows, groups] float32, zeros
                [rows, groups] uint8 (not read where symmetric): plain rounding's, replaced where better are found
    sums        [2] float64, added to: the norm found, and plain rounding's
    """
    rows, width = stored.shape
    norm, beta0, kappa, untouched = constants[0], constants[1], constants[2], constants[3]
    one_bits, one_float, whole, rest, size, size_bits, exponent = scratch(group)
    largest = np.float32((1 << bits) - 1)
    half = np.float32(1 << (bits - 1))
    lowest = np.float32(lowest_zero)
    base = -half if symmetric else ZERO
    for row in range(rows):
        for block in range((width + group - 1) // group):
            begin = block * group
            end = min(begin + group, width)
            n = end - begin
            weight = stored[row, begin:end]
            scale = scales[row, block]
            shift = ZERO if symmetric else np.float32(zeros[row, block])
            baseline = _stored_error(weight, scale, shift, base, base + largest, size, size_bits, exponent, norm)
            sums[1] += np.float64(baseline)
            if not abs(scale) <= LARGEST_HALF:
                sums[0] += np.float64(baseline)
                continue
            step = abs(scale)
            window = shift
            if symmetric:
                window = half if scale > ZERO else half - ONE
            kept_step, kept_window = step, window
            least = INFINITE
            beta = beta0
            count = np.float32(n)
            for _ in range(iterations + 1):
                biggest, first, square, total, inner = _round(
                    weight, step, -window, largest - window, whole, rest, size
                )
                if biggest > untouched:
                    taken, met = shrunk_sums(size, rest, whole, n, norm, beta)
                    total -= taken
                    inner -= met
                error = norm_of(size, size_bits, exponent, n, norm)
                if error < LESS * least:
                    least = error
                    kept_step, kept_window = step, window
                beta = np.float32(beta * kappa)
                before, before_window = step, window
                if symmetric:
                    step = _better_step(inner, square, step, one_bits, one_float)
                else:
                    spread = square - first * first / count
                    slope = (inner - first * total / count) / spread
                    line = ZERO
                    if spread > ZERO and slope > ZERO:
                        line = min(max((total - slope * first) / (count * slope), -largest), largest)
                    most = -INFINITE
                    for side in range(2):
                        moved = before_window - (np.floor(line) if side == 0 else np.ceil(line))
                        moved = min(max(moved, lowest), largest)
                        change = before_window - moved
                        product = inner + change * total
                        against = square + TWO * change * first + count * change * change
                        if against > ZERO and product > ZERO and product * product / against > most:
                            most = product * product / against
                            step = _better_step(product, against, before, one_bits, one_float)
                            window = moved
                if step == before and window == before_window and biggest <= untouched:
                    break  # nothing would change any more
            kept = kept_step
            if symmetric:
                if kept_window != half:
                    kept = -kept
                kept_window = ZERO
            found = _stored_error(weight, kept, kept_window, base, base + largest, size, size_bits, exponent, norm)
            if not found < LESS * baseline:
                sums[0] += np.float64(baseline)
                continue
            sums[0] += np.float64(found)
            scales[row, block] = kept
            if not symmetric:
                zeros[row, block] = np.uint8(kept_window)
            for i in range(n):
                code = min(max(np.rint(weight[i] / kept) + kept_window, base), base + largest)
                codes[row, begin + i] = np.uint8(np.int32(code))
