"""Products of up to 16 inputs by packed or 16-bit weights, as parts that a team of threads shares (team.py).

Inputs are rounded to 16-bit integers, each *span* of columns to a unit of its own, the largest of them over 32767: an
input is off by at most 2^-16 of its span's largest, a hundredth of what bfloat16 is. A span is a group's columns, or as
many of them as sums of 32 bits have room for. Under weights of 16 bits inputs stay as they are.

What a part needs is a record of addresses and sizes, which Python fills as an array of int64: handing arrays over one
by one takes as long as a small product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from roundel.inference.numba.emit import LANES, STEP, add_floats, add_span, widen
from roundel.inference.numba.layout import LAYOUTS
from roundel.inference.numba.team import PART, pointer_to, share_parts
from roundel.ops.numba.compiling import SETTINGS, jit
from roundel.ops.numba.stored import float_of, value_of
from roundel.ops.numba.tensors import stored_bits

__all__ = ["FewInputs", "multiply_floats"]

SPAN = 1 << 16  # columns times codes: so many products of codes and 16-bit inputs add up in 32 bits
LARGEST = 32767

_MATRIX = ("words", "scales", "zeros", "spans", "zero_count", "groups", "streams", "columns", "span_count")
_CALL = ("x", "out", "inputs", "width", "units", "sums", "whole")
_CODES = numba.from_dtype(np.dtype([(name, np.int64) for name in (*_MATRIX, *_CALL)]))
_FLOATS = numba.from_dtype(np.dtype([(name, np.int64) for name in ("weights", "x", "out", "rows", "width", "inputs")]))


class FewInputs:
    """x @ weight.T for a few inputs at a time; the arguments are those of `PackedRows`."""

    def __init__(
        self, words: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, e2m1: bool, group: int
    ) -> None:
        self._blocks, streams, self._columns = words.shape
        self._width = self._blocks * scales.shape[2]
        spans = _spans(self._columns, group, bits)
        self._kind, self._spans = (bits, e2m1, scales.dtype), len(spans)
        self._held = (words, scales, zeros, spans)
        sizes = (zeros.size, scales.shape[1], streams, self._columns, len(spans))
        self._matrix = (*(array.ctypes.data for array in self._held), *sizes)

    def product(self, x: Tensor) -> Tensor:
        """x float32 [inputs, in] -> float32 [inputs, rows of all blocks]"""
        entering, batch = _whole(x, self._columns)
        inputs = len(entering)
        out = torch.empty((inputs, self._width), dtype=torch.float32)
        given = np.array((*self._matrix, entering.data_ptr(), out.data_ptr(), inputs, self._width, 0, 0, 0), np.int64)
        places = inputs * self._spans + LANES  # for they are read in vectors
        rounded = np.empty(2 * places + inputs * self._columns // 2, np.int32)
        _round_inputs(given, rounded, places, batch)
        share_parts(_product(*self._kind, batch), given, self._blocks, self._width * self._columns)
        return out if inputs == len(x) else out[: len(x)]


def multiply_floats(weights: Tensor, x: Tensor) -> Tensor:
    """x float32 [inputs, in] @ weights.T for bfloat16 or float16 weights [out, in], float32 [inputs, out].

    Weights are widened as they are read.
    """
    out, width = weights.shape
    entering, batch = _whole(x, width)
    inputs, stored = len(entering), stored_bits(weights)
    result = torch.empty((inputs, out), dtype=torch.float32)
    places = (stored.ctypes.data, entering.data_ptr(), result.data_ptr())
    share_parts(_float_rows(stored.dtype, batch), np.array((*places, out, width, inputs), np.int64), out, out * width)
    return result[: len(x)]


def _whole(x: Tensor, columns: int) -> tuple[Tensor, int]:
    """Inputs with zeros up to whole batches and so many columns, and how many a batch is."""
    count, width = x.shape
    batch = 1 if count == 1 else 4
    if count % batch == 0 and width == columns:
        return x.contiguous(), batch
    entering = torch.zeros((-(-count // batch) * batch, columns), dtype=torch.float32)
    entering[:count, :width] = x
    return entering, batch


def _spans(columns: int, group: int, bits: int) -> np.ndarray:
    """[spans, 3] (first column, vectors of columns, group), in order."""
    found, most = [], SPAN >> bits
    for first in range(0, columns, group):
        end = min(first + group, columns)
        found += [(at, (min(at + most, end) - at) // STEP, first // group) for at in range(first, end, most)]
    return np.array(found, np.int64)


@jit
def _round_inputs(given, rounded, places, batch):  # type: ignore[no-untyped-def]
    """Fill `rounded` with units (as float32) and sums, both by batch, span, input, and with whole inputs; say where
    these lie in `given`."""
    numbers = rounded.ctypes.data
    given[-3], given[-2], given[-1] = numbers, numbers + 4 * places, numbers + 8 * places
    n = numba.carray(pointer_to(given.ctypes.data, _CODES), 1)[0]
    shape = (n.inputs, n.columns)
    x, bits = numba.carray(pointer_to(n.x, np.float32), shape), numba.carray(pointer_to(n.x, np.int32), shape)
    spans = numba.carray(pointer_to(n.spans, np.int64), (n.span_count, 3))
    units, sums = rounded[:places].view(np.float32), rounded[places:]
    whole = numba.carray(pointer_to(n.whole, np.int16), shape)
    for each in range(n.inputs):
        for span in range(n.span_count):
            first, end = spans[span, 0], spans[span, 0] + 16 * spans[span, 1]
            place = (each // batch * n.span_count + span) * batch + each % batch
            units[place], sums[place] = _round_span(x[each, first:end], bits[each, first:end], whole[each, first:end])


@jit
def _round_span(x, bits, whole):  # type: ignore[no-untyped-def]
    """The unit of some columns, and the sum of them in it. bits: those of x, whose order is that of floats of one
    sign."""
    largest = np.int32(0)
    for column in range(len(bits)):
        largest = max(largest, np.int32(bits[column] & np.int32(0x7FFFFFFF)))
    unit, inverse = float_of(largest) / np.float32(LARGEST), np.float32(0)
    if largest >= np.int32(0x7F800000):
        unit = np.float32(np.nan)
    elif unit > 0:
        inverse = min(np.float32(1) / unit, np.float32(3e38))
    for column in range(len(x)):
        whole[column] = np.int16(np.rint(x[column] * inverse))
    if inverse == 0:
        whole[:] = 0
    total = np.int32(0)
    for column in range(len(whole)):
        total = np.int32(total + np.int32(whole[column]))
    return unit, total


@cache
def _product(bits: int, e2m1: bool, stored: np.dtype[Any], batch: int) -> int:
    """A part of blocks of rows, for one kind of codes and scales; compiled when it is first needed."""
    rows, middle, kind = LAYOUTS[bits].rows, 0 if e2m1 else 1 << (bits - 1), numba.from_dtype(stored)

    def run(given, begin, end):  # type: ignore[no-untyped-def]
        n = numba.carray(pointer_to(given, _CODES), 1)[0]
        w, x = numba.carray(pointer_to(n.words, np.uint16), 1), numba.carray(pointer_to(n.whole, np.int16), 1)
        scales, zeros = numba.carray(pointer_to(n.scales, kind), 1), numba.carray(pointer_to(n.zeros, np.uint8), 1)
        units, sums = numba.carray(pointer_to(n.units, np.float32), 1), numba.carray(pointer_to(n.sums, np.int32), 1)
        spans = numba.carray(pointer_to(n.spans, np.int64), (n.span_count, 3))
        out = numba.carray(pointer_to(n.out, np.float32), (n.inputs, n.width))
        scale, zero = np.zeros(rows + 8, np.float32), np.full(rows + 8, middle, np.int32)
        total = np.empty(rows * batch, np.float32)
        columns, count, groups, has_zeros = n.columns, n.span_count, n.groups, n.zero_count > 0
        size = n.streams * columns
        for block in range(begin, end):
            for each in range(0, n.inputs, batch):
                total[:] = 0
                for span in range(count):
                    first, steps, part = spans[span, 0], spans[span, 1], (block * groups + spans[span, 2]) * rows
                    widen(scales, part, scale, rows)
                    if has_zeros:
                        widen(zeros, part, zero, rows)
                    at, xa, place = block * size + first, each * columns + first, each * count + span * batch
                    add_span(
                        w, at, columns, steps, x, xa, columns, sums, units, place, scale, zero, total, bits, e2m1, batch
                    )
                for row in range(rows):
                    for other in range(batch):
                        out[each + other, block * rows + row] = total[row * batch + other]

    return _address(run)


@cache
def _float_rows(stored: np.dtype[Any], batch: int) -> int:
    """A part of rows of weights of 16 bits, for one kind of them."""
    kind = numba.from_dtype(stored)

    def run(given, begin, end):  # type: ignore[no-untyped-def]
        n = numba.carray(pointer_to(given, _FLOATS), 1)[0]
        width, inputs = n.width, n.inputs
        weights = numba.carray(pointer_to(n.weights, kind), n.rows * width)
        x = numba.carray(pointer_to(n.x, np.float32), inputs * width)
        out = numba.carray(pointer_to(n.out, np.float32), (inputs, n.rows))
        steps, total = width // 32, np.empty(batch * 8, np.float32)
        for row in range(begin, end):
            at = row * width
            for first in range(0, inputs, batch):
                add_floats(weights, at, x, first * width, width, steps, total, batch)
                for each in range(batch):
                    found = np.float32(0)
                    for lane in range(8):
                        found += total[each * 8 + lane]
                    for column in range(steps * 32, width):
                        found += value_of(weights[at + column]) * x[(first + each) * width + column]
                    out[first + each, row] = found

    return _address(run)


def _address(run: Callable[..., None]) -> int:
    """Of a part, compiled."""
    found: int = numba.cfunc(PART, **SETTINGS)(run).address
    return found
