"""The searches behind ggml's block types: a scale, a scale and a minimum, or a scale for a table, for each block.

Written after the arithmetic of ggml's reference quantizer (llama.cpp, ggml/src/ggml-quants.c: make_qx_quants,
make_q3_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants, the IQ4 search), so that results are its bits:
all is float32, sums run from left to right, and the order of products is kept. Here every function takes many blocks
[blocks, n] side by side; `ops.numba.lanes` does the same sixteen and more at a time.

Each minimizes  sum w * (x - decoded)^2  over trial steps; the codes of a trial have a best scale of their own, by
least squares, and that is what is judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "EMPTY",
    "POSITIVE_TRIALS",
    "SIGNED_TRIALS",
    "SWEEPS",
    "TABLE_TRIALS",
    "Affine",
    "affine_fit",
    "largest_in",
    "levels_of",
    "lowest_in",
    "nearest_in",
    "over",
    "positive_fit",
    "root",
    "running_sum",
    "signed_descent",
    "signed_fit",
    "table_fit",
]

EMPTY = 1e-15  # a block whose largest magnitude is below this counts as zero
SWEEPS = 5  # of coordinate descent
TABLE_TRIALS = 7  # to each side
SIGNED_TRIALS = 9
POSITIVE_TRIALS = 4


@dataclass(frozen=True, kw_only=True)
class Affine:
    """The trials of `affine_fit`: the range is divided by largest + first + k * step, for k = 0 ... count.

    absolute   trials are judged by the sum of absolute errors, not of squares
    """

    first: float
    step: float
    count: int
    absolute: bool = False

    def factors(self, largest: int) -> list[float]:
        first, step = np.float32(self.first), np.float32(self.step)
        return [float(first + step * np.float32(k) + np.float32(largest)) for k in range(self.count + 1)]


def running_sum(terms: Tensor) -> Tensor:
    """Sums over the last axis in float32, from left to right."""
    total = torch.zeros_like(terms[..., 0])
    for i in range(terms.shape[-1]):
        total = total + terms[..., i]
    return total


def over(numerator: float, values: Tensor) -> Tensor:
    """numerator / values, rounded once; torch's own spelling multiplies by the reciprocal."""
    return torch.full_like(values, numerator) / values


def root(values: Tensor) -> Tensor:
    """Square roots, rounded correctly; torch's in float32 sometimes are not."""
    return values.double().sqrt().float()


def levels_of(values: Tensor, low: float, high: float) -> Tensor:
    """The nearest whole numbers, half to even, within bounds; what is no number is the lower bound."""
    return torch.where(torch.isnan(values), low, torch.round(values).clamp(low, high))


def affine_fit(x: Tensor, weight: Tensor, largest: int, trials: Affine) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 ... largest with  x ≈ scale * code - low.

    x, weight   [blocks, n]
    returns     scale [blocks], low [blocks] (at least 0), codes [blocks, n], all float32
    """
    total, first_moment = running_sum(weight), running_sum(weight * x)
    high, low = x.amax(-1), lowest_in(x)
    low = torch.where(low > 0, 0.0, low)
    flat = high <= low

    def judged(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        rest = scale[:, None] * codes + low[:, None] - x
        return running_sum(weight * (rest.abs() if trials.absolute else rest * rest))

    inverse = over(largest, high - low)
    scale = over(1, inverse)
    codes = levels_of(inverse[:, None] * (x - low[:, None]), 0, largest)
    least = judged(codes, scale, low)
    for factor in trials.factors(largest):
        inverse = over(factor, high - low)
        tried = levels_of(inverse[:, None] * (x - low[:, None]), 0, largest)
        counted = weight * tried
        ones, squares, products = running_sum(counted), running_sum(counted * tried), running_sum(counted * x)
        determinant = total * squares - ones * ones
        step = (total * products - first_moment * ones) / determinant
        base = (squares * first_moment - ones * products) / determinant
        step = torch.where(base > 0, products / squares, step)
        base = torch.where(base > 0, 0.0, base)
        error = judged(tried, step, base)
        better = (determinant > 0) & (error < least)
        least, scale, low = (torch.where(better, a, b) for a, b in ((error, least), (step, scale), (base, low)))
        codes = torch.where(better[:, None], tried, codes)
    return torch.where(flat, 0.0, scale), -low, torch.where(flat[:, None], 0.0, codes)


def largest_in(x: Tensor) -> Tensor:
    """Of each block the value of largest magnitude, the first of equals; never -0.0."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))[:, 0] + 0.0


def lowest_in(x: Tensor) -> Tensor:
    """Of each block the lowest value, the first of equals: -0.0 equals 0.0."""
    return x.gather(-1, x.argmin(-1, keepdim=True))[:, 0]


def signed_fit(x: Tensor, weight: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Codes -half ... half - 1 with  x ≈ scale * code; the scale may be negative.

    returns   scale [blocks], codes + half [blocks, n]; 0 for a block of zeros
    """
    edge = largest_in(x)
    empty = edge.abs() < EMPTY

    def tried(inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = levels_of(inverse[:, None] * x, -half, half - 1)
        return codes, running_sum(weight * x * codes), running_sum(weight * codes * codes)

    codes, product, square = tried(over(-half, edge))
    scale = torch.where(square != 0, product / square, 0.0)
    best = scale * product
    for k in (k for k in range(-SIGNED_TRIALS, SIGNED_TRIALS + 1) if k):
        factor = np.float32(half) + np.float32(0.1) * np.float32(k)
        trial, product, square = tried(over(-float(factor), edge))
        better = (square > 0) & (product * product > best * square)
        fitted = product / square
        scale, best = torch.where(better, fitted, scale), torch.where(better, fitted * product, best)
        codes = torch.where(better[:, None], trial, codes)
    return torch.where(empty, 0.0, scale), torch.where(empty[:, None], 0.0, codes + half)


def signed_descent(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """`signed_fit` with weights x^2 by coordinate descent: each code in turn moves to where the scale would be best."""
    edge = largest_in(x)
    empty = edge.abs() < EMPTY
    weight = x * x
    codes = levels_of(over(-half, edge)[:, None] * x, -half, half - 1)
    product, square = running_sum(weight * x * codes), running_sum(weight * codes * codes)
    for _ in range(SWEEPS):
        for i in range(x.shape[-1]):
            w, value, code = weight[:, i], x[:, i], codes[:, i]
            without, rest = product - w * value * code, square - w * code * code
            moved = _wrapped_level(value * rest / without, -half, half - 1)
            ahead, power = without + w * value * moved, rest + w * moved * moved
            better = (without > 0) & (moved != code) & (power > 0)
            better = better & (ahead * ahead * square > product * product * power)
            codes[:, i] = torch.where(better, moved, code)
            product, square = torch.where(better, ahead, product), torch.where(better, power, square)
    scale = torch.where(square > 0, product / square, 0.0)
    return torch.where(empty, 0.0, scale), torch.where(empty[:, None], 0.0, codes + half)


def _wrapped_level(values: Tensor, low: int, high: int) -> Tensor:
    """`levels_of` for values that may leave what ggml's rounding can hold, with what it makes of them."""
    bits = (values + 12582912.0).view(torch.int32)
    return ((bits & 0x7FFFFF) - 0x400000).clamp(low, high).float()


def positive_fit(x: Tensor, weight: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes 0 ... largest with  x ≈ scale * code, for x that are at least 0: the scales of a super-block.

    returns   scale [blocks], codes [blocks, n]
    """
    high = x.amax(-1).clamp(min=0)
    empty = high < EMPTY

    def error_of(inverse: Tensor) -> Tensor:
        codes = torch.round(inverse[:, None] * x).clamp(max=largest)
        rest = x - over(1, inverse)[:, None] * codes
        return running_sum(weight * rest * rest)

    inverse = over(largest, high)
    least = error_of(inverse)
    for k in (k for k in range(-POSITIVE_TRIALS, POSITIVE_TRIALS + 1) if k):
        trial = over(float(np.float32(0.1) * np.float32(k) + np.float32(largest)), high)
        error = error_of(trial)
        inverse, least = torch.where(error < least, trial, inverse), torch.where(error < least, error, least)
    codes = torch.round(inverse[:, None] * x).clamp(max=largest)
    product, square = running_sum(weight * x * codes), running_sum(weight * codes * codes)
    for _ in range(SWEEPS):
        for i in range(x.shape[-1]):
            w, value, code = weight[:, i], x[:, i], codes[:, i]
            without, rest = product - w * value * code, square - w * code * code
            moved = _wrapped_level(value * rest / without, -(1 << 23), largest)
            ahead, power = without + w * value * moved, rest + w * moved * moved
            better = (without > 0) & (rest > 0) & (moved != code)
            better = better & (ahead * ahead * square > product * product * power)
            codes[:, i] = torch.where(better, moved, code)
            product, square = torch.where(better, ahead, product), torch.where(better, power, square)
    scale = torch.where(square > 0, product / square, 0.0)
    return torch.where(empty, 0.0, scale), torch.where(empty[:, None], 0.0, codes)


def nearest_in(values: Tensor, table: tuple[float, ...]) -> Tensor:
    """The index of the nearest entry of a rising table; of two as near, the upper."""
    middles = torch.tensor([low + high for low, high in pairwise(table)], dtype=torch.float32, device=values.device)
    return torch.bucketize(values + values, middles, right=True)


def table_fit(x: Tensor, weight: Tensor, table: tuple[float, ...]) -> Tensor:
    """The scale [blocks] with which entries of a table come nearest; 0 for a block of zeros."""
    edge = largest_in(x)
    entries = torch.tensor(table, dtype=torch.float32, device=x.device)

    def tried(inverse: Tensor) -> tuple[Tensor, Tensor]:
        value = entries[nearest_in(inverse[:, None] * x, table)]
        return running_sum(weight * value * x), running_sum(weight * value * value)

    product, square = tried(over(1, -edge / table[0]))
    scale = torch.where(square > 0, product / square, 0.0)
    best = scale * product
    for k in range(-TABLE_TRIALS, TABLE_TRIALS + 1):
        product, square = tried(over(k + table[0], edge))
        better = (square > 0) & (product * product > best * square)
        fitted = product / square
        scale, best = torch.where(better, fitted, scale), torch.where(better, fitted * product, best)
    return torch.where(edge.abs() < EMPTY, 0.0, scale)
