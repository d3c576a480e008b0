"""`ops.learned_rounding` and `ops.learned_descent` in numba: one pass over the weights forward, one backward.

Both read the weights, the shifts and (backward) the gradient once, and write once; what they need twice they compute
twice, which costs less than memory. Rows are shared out among as many threads as torch uses; the result does not
depend on how many.

Rounded weights, and shifts moved by signs, are bit-equal to the definition. Sums over a block are taken in another
order than torch's, so they agree to float32 rounding of the sum of magnitudes only. Adam's arithmetic differs in last
bits, because torch multiplies and adds at once where it can.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from roundel.ops.learned_descent import FIRST, LEAST_SQUARE, SECOND, Moments, adam_correction
from roundel.ops.learned_rounding import Learned, Range
from roundel.ops.numba.compiling import SETTINGS, jit
from roundel.ops.numba.rows import share_rows
from roundel.ops.numba.stored import value_of
from roundel.ops.numba.tensors import stored_bits
from roundel.scheme import Grid

__all__ = ["descend_kernel", "round_kernel"]

HALF, ZERO = np.float32(0.5), np.float32(0.0)
KEPT, ADDED = np.float32(FIRST), np.float32(1 - FIRST)
KEPT_SQUARES, ADDED_SQUARES = np.float32(SECOND), np.float32(1 - SECOND)
LEAST = np.float32(LEAST_SQUARE)

_inline = numba.njit(nogil=True, error_model="numpy", inline="always")
_sums = numba.njit(**SETTINGS, fastmath={"reassoc", "nsz", "contract"})


def round_kernel(learned: Learned, found: Range, out: Tensor) -> Tensor:
    """`ops.learned_rounding.round_matrix`."""
    weight = stored_bits(learned.weight)
    shift, scale, zero, base, filled = _arrays(learned.shift, found.scale, found.zero, _base(found), out)
    group, grid = learned.columns, learned.grid
    low, high, mantissa, smallest = _element(grid)

    def rows(begin: int, end: int) -> None:
        part = slice(begin, end)
        if grid.element.is_integer:
            given = weight[part], shift[part], scale[part], zero[part], base[part]
            _round_integers(*given, group, low, high, filled[part])
        else:
            _round_floats(weight[part], shift[part], scale[part], group, high, mantissa, smallest, filled[part])

    share_rows(rows, weight.shape[0], weight.shape[1])
    return out


def descend_kernel(
    learned: Learned, found: Range, gradient: Tensor, rate: float, moments: Moments | None = None, step: int = 1
) -> tuple[Tensor, Tensor]:
    """Moves `learned.shift`, and its moments, as `ops.learned_descent.descend` does.

    returns  [out, blocks] sums: of gradient * (nearest - inside * (weight - base) / scale), and of
             gradient * (1 - inside)
    """
    by_scale, clamped = torch.empty_like(found.scale), torch.empty_like(found.scale)
    none = torch.empty(gradient.shape[0], 0, dtype=torch.float32)
    first, second = (none, none) if moments is None else (moments.first, moments.second)
    written = _arrays(learned.shift, found.scale, found.zero, _base(found), first, second, by_scale, clamped)
    arrays = [gradient.detach().contiguous().numpy(), stored_bits(learned.weight), *written]
    element = _element(learned.grid)
    size = rate if moments is None else rate * adam_correction(step)

    def rows(begin: int, end: int) -> None:
        part = (each[begin:end] for each in arrays)
        _descend(*part, learned.columns, *element, moments is not None, np.float32(size))

    share_rows(rows, gradient.shape[0], gradient.shape[1])
    return by_scale, clamped


@jit
def _round_integers(weight, shift, scale, zero, base, group, low, high, out):  # type: ignore[no-untyped-def]
    rows, width = weight.shape
    for row in range(rows):
        for block in range((width + group - 1) // group):
            begin = block * group
            n = min(group, width - begin)
            w, v, filled = weight[row, begin : begin + n], shift[row, begin : begin + n], out[row, begin : begin + n]
            s, b = scale[row, block], base[row, block]
            lowest, highest = low - zero[row, block], high - zero[row, block]
            for i in range(n):
                steps = min(max((value_of(w[i]) - b) / s + v[i], lowest), highest)
                filled[i] = np.rint(steps) * s + b


@_inline
def _nearest_float(steps, high, mantissa, smallest):  # type: ignore[no-untyped-def]
    """The element nearest to `steps`, half to even."""
    size = np.float32(min(abs(steps), high))
    # The grid's spacing at a value is a power of two, below the smallest normal that of the subnormals.
    exponent = max(size.view(np.uint32) & np.uint32(0x7F800000), smallest)
    spacing = np.uint32(exponent - mantissa).view(np.float32)
    nearest = np.rint(size / spacing) * spacing
    return -nearest if steps < ZERO else nearest


@jit
def _round_floats(weight, shift, scale, group, high, mantissa, smallest, out):  # type: ignore[no-untyped-def]
    rows, width = weight.shape
    for row in range(rows):
        for block in range((width + group - 1) // group):
            begin = block * group
            n = min(group, width - begin)
            w, v, filled = weight[row, begin : begin + n], shift[row, begin : begin + n], out[row, begin : begin + n]
            s = scale[row, block]
            for i in range(n):
                filled[i] = _nearest_float(value_of(w[i]) / s + v[i], high, mantissa, smallest) * s


@jit
def _descend(  # type: ignore[no-untyped-def]
    gradient,
    weight,
    shift,
    scale,
    zero,
    base,
    first,
    second,
    by_scale,
    clamped,
    group,
    low,
    high,
    mantissa,
    smallest,
    adam,
    rate,
):
    """Row by row, block by block; what is computed of a block stays in the nearest cache."""
    rows, width = weight.shape
    terms, inner = np.empty(group, np.float32), np.empty(group, np.float32)
    for row in range(rows):
        for block in range((width + group - 1) // group):
            begin = block * group
            end = min(begin + group, width)
            g, w, v = gradient[row, begin:end], weight[row, begin:end], shift[row, begin:end]
            s, z = scale[row, block], zero[row, block]
            if mantissa == 0:
                _look_at_integers(g, w, v, s, base[row, block], low - z, high - z, terms, inner)
            else:
                _look_at_floats(g, w, v, s, high, mantissa, smallest, terms, inner)
            by_scale[row, block], clamped[row, block] = _add(g, terms, inner)
            if adam:
                _move_by_moments(v, inner, s, first[row, begin:end], second[row, begin:end], rate)
            else:
                _move_by_sign(v, inner, rate if s > ZERO else -rate)


@jit
def _look_at_integers(g, w, v, s, b, lowest, highest, terms, inner):  # type: ignore[no-untyped-def]
    """Of a block: its terms of the gradient by scale, and the gradient where codes are not clamped, else 0."""
    for i in range(len(g)):
        ratio = (value_of(w[i]) - b) / s
        steps = ratio + v[i]
        nearest = np.rint(min(max(steps, lowest), highest))
        inside = abs(steps - nearest) <= HALF
        terms[i] = g[i] * (nearest - (ratio if inside else ZERO))
        inner[i] = g[i] if inside else ZERO


@jit
def _look_at_floats(g, w, v, s, high, mantissa, smallest, terms, inner):  # type: ignore[no-untyped-def]
    for i in range(len(g)):
        ratio = value_of(w[i]) / s
        steps = ratio + v[i]
        inside = abs(steps) <= high
        terms[i] = g[i] * (_nearest_float(steps, high, mantissa, smallest) - (ratio if inside else ZERO))
        inner[i] = g[i] if inside else ZERO


@_sums
def _add(g, terms, inner):  # type: ignore[no-untyped-def]
    total, outside = ZERO, ZERO
    for i in range(len(g)):
        total += terms[i]
        outside += g[i] - inner[i]
    return total, outside


@jit
def _move_by_sign(v, inner, rate):  # type: ignore[no-untyped-def]
    for i in range(len(v)):
        v[i] -= rate if inner[i] > ZERO else (-rate if inner[i] < ZERO else ZERO)


@jit
def _move_by_moments(v, inner, s, first, second, rate):  # type: ignore[no-untyped-def]
    for i in range(len(v)):
        g = inner[i] * s
        first[i] = KEPT * first[i] + g * ADDED
        second[i] = KEPT_SQUARES * second[i] + g * g * ADDED_SQUARES
        v[i] -= ZERO if second[i] < LEAST else rate * (first[i] / np.sqrt(second[i]))


def _element(grid: Grid) -> tuple[np.float32, np.float32, np.uint32, np.uint32]:
    """(lowest, highest, fraction bits as a float32's exponent counts them or 0 for integers, bits of the smallest
    normal)."""
    if grid.element.is_integer:
        return np.float32(grid.element.lo), np.float32(grid.element.hi), np.uint32(0), np.uint32(0)
    mantissa, smallest = (1, 1.0) if grid.element.name == "e2m1" else (3, 2.0**-6)
    bits = np.uint32(mantissa << 23), np.float32(smallest).view(np.uint32)
    return np.float32(grid.element.lo), np.float32(grid.element.hi), *bits


def _base(found: Range) -> Tensor:
    return torch.zeros_like(found.scale) if found.base is None else found.base


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors)
    return [tensor.detach().numpy() for tensor in tensors]
