"""Loops around the inner loops of emit.py: over blocks of rows, spans of columns, and inputs.

Few inputs are rounded to 16-bit integers, each *span* of columns to a unit of its own, the largest of them over 32767:
an input is off by at most 2^-16 of its span's largest, a hundredth of what bfloat16 is. A span is a group's columns, or
as many of them as sums of 32 bits have room for. For many inputs weights are decoded to float32, and torch multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from roundel.inference.numba.emit import LANES, STEP, add_floats, add_span, spread_group, widen
from roundel.inference.numba.layout import LAYOUTS
from roundel.ops.numba.rows import share_rows
from roundel.ops.numba.stored import float_of, value_of
from roundel.ops.numba.tensors import stored_bits

__all__ = ["FEW", "PackedRows", "multiply_floats", "pack_rows_of_words"]

FEW = 16  # inputs at a time, up to which codes are decoded in registers; beyond, once for all into a slab
SLAB = 1 << 21  # weights decoded at a time for many inputs: 8 MB, which the last cache holds
SPAN = 1 << 16  # columns times codes: so many products of codes and 16-bit inputs add up in 32 bits
LARGEST = 32767

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)


class PackedRows:
    """A matrix [out, in] of integers, or of E2M1 codes at half their scale, in the words of layout.py.

    words    uint16 [blocks, streams, columns]
    scales   [blocks, groups, rows of a block], uint16 / int16 / uint32 as `ops.numba.stored` reads them
    zeros    uint8, like scales, or empty
    e2m1     whether codes are indices of that table, and mean twice its values
    group    columns that share a scale, a multiple of 16
    """

    def __init__(
        self,
        words: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray,
        bits: int,
        e2m1: bool,
        shape: tuple[int, int],
        group: int,
    ) -> None:
        self.shape = shape
        self.blocks: int = words.shape[0]
        self.columns: int = words.shape[2]
        self.rows: int = scales.shape[2]
        numbers = (words.reshape(-1), scales.reshape(-1), zeros.reshape(-1))
        self._spans = _spans(self.columns, group, bits)
        self._kind = (bits, e2m1)
        self._stored = (*numbers, scales.shape[1], group, words.shape[1], self.columns)

    def product(self, x: Tensor) -> Tensor:
        """x float32 [inputs, in] -> x @ weight.T, float32 [inputs, out]."""
        return self._few(x) if len(x) <= FEW else self._many(x)

    def decode(self, begin: int, end: int, slab: np.ndarray) -> None:
        """The weights of blocks begin .. end, into float32 [their rows, columns]."""
        run = _decode(*self._kind)

        def share(first: int, last: int) -> None:
            run(*self._stored, begin + first, begin + last, slab[first * self.rows :].reshape(-1))

        share_rows(share, end - begin, self._block_weights)

    def _few(self, x: Tensor) -> Tensor:
        entering, batch = _whole(x, self.columns)
        inputs = len(entering)
        whole, out = np.empty(entering.shape, np.int16), np.empty((inputs, self.blocks * self.rows), np.float32)
        units = np.zeros(inputs * len(self._spans) + LANES, np.float32)
        sums = np.zeros(len(units), np.int32)
        _round_inputs(entering, entering.view(np.int32), self._spans, batch, whole, units, sums)
        flat, run = (self._spans, whole.reshape(-1), units, sums), _product(*self._kind, batch)
        share_rows(lambda begin, end: run(*self._stored, *flat, begin, end, out), self.blocks, self._block_weights)
        return torch.from_numpy(out)[: len(x), : self.shape[0]]

    @property
    def _block_weights(self) -> int:
        return self.rows * self.columns

    def _many(self, x: Tensor) -> Tensor:
        out, width = self.shape
        result = torch.empty((len(x), out), dtype=torch.float32)
        step = max(1, SLAB // self._block_weights)
        slab = torch.empty((min(step, self.blocks) * self.rows, self.columns), dtype=torch.float32)
        numbers = slab.numpy()
        for begin in range(0, self.blocks, step):
            end = min(begin + step, self.blocks)
            self.decode(begin, end, numbers)
            rows = slice(begin * self.rows, min(end * self.rows, out))
            result[:, rows] = x @ slab[: rows.stop - rows.start, :width].T
        return result


def pack_rows_of_words(codes: np.ndarray, bits: int, lowest: int = 0) -> np.ndarray:
    """Codes [out, in] uint8 -> words uint16 [blocks, streams, columns].

    lowest   0 for unsigned codes; the smallest code of signed ones, whose bytes are given
    """
    layout, (out, width) = LAYOUTS[bits], codes.shape
    blocks = -(-out // layout.rows)
    words = np.zeros((blocks, layout.streams, -(-width // STEP) * STEP), np.uint16)
    table = [
        (row, take.word, take.up, take.mask, take.down) for row in range(layout.rows) for take in layout.takes(row)
    ]
    entries, above = np.array(table, np.int64), np.uint8(-lowest)
    share_rows(
        lambda begin, end: _pack(codes, above, entries, layout.rows, words, begin, end), blocks, layout.rows * width
    )
    return words


def multiply_floats(weights: Tensor, x: Tensor) -> Tensor:
    """x float32 [inputs, in] @ weights.T for bfloat16 or float16 weights [out, in], float32 [inputs, out].

    Weights are widened as they are read.
    """
    out, width = weights.shape
    entering, batch = _whole(x, width)
    result = np.empty((len(entering), out), np.float32)
    stored, flat = stored_bits(weights).reshape(-1), entering.reshape(-1)
    share_rows(lambda begin, end: _float_rows(stored, width, flat, batch, begin, end, result), out, width)
    return torch.from_numpy(result)[: len(x)]


def _whole(x: Tensor, columns: int) -> tuple[np.ndarray, int]:
    """Inputs with zeros up to whole batches and so many columns, and how many a batch is."""
    count, width = x.shape
    batch = 1 if count == 1 else 4
    if count % batch == 0 and width == columns:
        return x.contiguous().numpy(), batch
    entering = np.zeros((-(-count // batch) * batch, columns), np.float32)
    entering[:count, :width] = x.numpy()
    return entering, batch


@_jit
def _pack(codes, above, table, rows, words, begin, end):  # type: ignore[no-untyped-def]
    out, width = codes.shape
    for block in range(begin, end):
        for entry in range(table.shape[0]):
            row = block * rows + table[entry, 0]
            if row < out:
                off, mask, shift = np.uint16(table[entry, 2]), np.uint16(table[entry, 3]), np.uint16(table[entry, 4])
                line, stored = words[block, table[entry, 1]], codes[row]
                for column in range(width):
                    code = np.uint16(np.uint8(stored[column] + above))  # wraps around, as two's complement does
                    line[column] |= np.uint16(np.uint16(np.uint16(code >> off) & mask) << shift)


def _spans(columns: int, group: int, bits: int) -> np.ndarray:
    """[spans, 3] (first column, vectors of columns, group), in order."""
    found, most = [], SPAN >> bits
    for first in range(0, columns, group):
        end = min(first + group, columns)
        found += [(at, (min(at + most, end) - at) // STEP, first // group) for at in range(first, end, most)]
    return np.array(found, np.int64)


@_jit
def _round_inputs(x, bits, spans, batch, whole, units, sums):  # type: ignore[no-untyped-def]
    """bits: those of x as int32, whose order is that of floats of one sign. Units and sums go by batch, span, input."""
    for each in range(x.shape[0]):
        for span in range(spans.shape[0]):
            first, end = spans[span, 0], spans[span, 0] + 16 * spans[span, 1]
            entering, stored, rounded = x[each, first:end], bits[each, first:end], whole[each, first:end]
            largest = np.int32(0)
            for column in range(len(stored)):
                largest = max(largest, np.int32(stored[column] & np.int32(0x7FFFFFFF)))
            unit = float_of(largest) / np.float32(LARGEST)
            inverse = np.float32(0)
            if largest >= np.int32(0x7F800000):
                unit = np.float32(np.nan)
            elif unit > 0:
                inverse = min(np.float32(1) / unit, np.float32(3e38))
            for column in range(len(entering)):
                rounded[column] = np.int16(np.rint(entering[column] * inverse))
            if inverse == 0:
                rounded[:] = 0
            total = np.int32(0)
            for column in range(len(rounded)):
                total = np.int32(total + np.int32(rounded[column]))
            place = (each // batch * spans.shape[0] + span) * batch + each % batch
            units[place], sums[place] = unit, total


@cache
def _product(bits: int, e2m1: bool, batch: int) -> Callable[..., None]:
    """The loop over blocks for one kind of codes, compiled when it is first needed."""
    rows, middle = LAYOUTS[bits].rows, 0 if e2m1 else 1 << (bits - 1)

    def run(w, scales, zeros, groups, group, streams, columns, spans, x, units, sums, begin, end, out):  # type: ignore[no-untyped-def]
        scale, zero = np.zeros(rows + 8, np.float32), np.full(rows + 8, middle, np.int32)
        total = np.empty(rows * batch, np.float32)
        count = spans.shape[0]
        for block in range(begin, end):
            for each in range(0, out.shape[0], batch):
                total[:] = 0
                for span in range(count):
                    first, steps, part = spans[span, 0], spans[span, 1], (block * groups + spans[span, 2]) * rows
                    widen(scales, part, scale, rows)
                    if zeros.size:
                        widen(zeros, part, zero, rows)
                    at, xa = block * streams * columns + first, each * columns + first
                    place = each * count + span * batch
                    add_span(
                        w, at, columns, steps, x, xa, columns, sums, units, place, scale, zero, total, bits, e2m1, batch
                    )
                for row in range(rows):
                    for other in range(batch):
                        out[each + other, block * rows + row] = total[row * batch + other]

    compiled: Callable[..., None] = _jit(run)
    return compiled


@cache
def _decode(bits: int, e2m1: bool) -> Callable[..., None]:
    """Decoding for one kind of codes, compiled when it is first needed."""
    rows, middle = LAYOUTS[bits].rows, 0 if e2m1 else 1 << (bits - 1)

    def run(words, scales, zeros, groups, group, streams, columns, begin, end, out):  # type: ignore[no-untyped-def]
        scale, zero = np.empty(rows, np.float32), np.full(rows, middle, np.int32)
        for block in range(begin, end):
            for part in range(groups):
                widen(scales, (block * groups + part) * rows, scale, rows)
                if zeros.size:
                    widen(zeros, (block * groups + part) * rows, zero, rows)
                first = part * group
                steps = (min(first + group, columns) - first) // 16
                at, to = block * streams * columns + first, (block - begin) * rows * columns + first
                spread_group(words, at, columns, steps, scale, zero, out, to, columns, bits, e2m1)

    compiled: Callable[..., None] = _jit(run)
    return compiled


@_jit
def _float_rows(weights, width, x, batch, begin, end, out):  # type: ignore[no-untyped-def]
    steps, total = width // 32, np.empty(batch * 8, np.float32)
    for row in range(begin, end):
        at = row * width
        for first in range(0, out.shape[0], batch):
            if batch == 1:
                add_floats(weights, at, x, first * width, width, steps, total, 1)
            else:
                add_floats(weights, at, x, first * width, width, steps, total, 4)
            for each in range(batch):
                found = np.float32(0)
                for lane in range(8):
                    found += total[each * 8 + lane]
                for column in range(steps * 32, width):
                    found += value_of(weights[at + column]) * x[(first + each) * width + column]
                out[first + each, row] = found
