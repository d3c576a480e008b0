"""Loops around the inner loops of emit.py: over blocks of rows, groups of columns, and inputs."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from roundel.inference.numba.emit import add_floats, add_group, spread_group
from roundel.inference.numba.layout import LAYOUTS
from roundel.ops.numba.rows import share_rows
from roundel.ops.numba.stored import value_of
from roundel.ops.numba.tensors import stored_bits

__all__ = ["PackedRows", "multiply_floats", "pack_rows_of_words"]

FEW = 16  # inputs at a time, up to which codes are decoded in registers; beyond, once for all into a slab
SLAB = 1 << 21  # weights decoded at a time for many inputs: 8 MB, which the last cache holds
LANES = 8

_jit = numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)


class PackedRows:
    """A matrix [out, in] of integers, in the words of layout.py.

    words    uint32 [blocks, streams, columns]
    scales   [blocks, groups, rows of a block], uint16 / int16 / uint32 as `ops.numba.stored` reads them
    zeros    uint8, like scales, or empty
    group    columns that share a scale, a multiple of 8
    """

    def __init__(
        self, words: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, shape: tuple[int, int], group: int
    ) -> None:
        self.words, self.scales, self.zeros = words.reshape(-1), scales, zeros
        self.bits, self.shape, self.group = bits, shape, group
        self.blocks, self.streams, self.columns = words.shape
        self.rows = LAYOUTS[bits].rows

    def product(self, x: Tensor) -> Tensor:
        """x float32 [inputs, in] -> x @ weight.T, float32 [inputs, out]."""
        return self._few(x) if len(x) <= FEW else self._many(x)

    def decode(self, begin: int, end: int, slab: np.ndarray) -> None:
        """The weights of blocks begin .. end, into float32 [their rows, columns]."""

        def share(first: int, last: int) -> None:
            rows = slab[(first - begin) * self.rows :].reshape(-1)
            _decode(
                self.words,
                self.scales,
                self.zeros,
                self.bits,
                self.group,
                self.streams,
                self.columns,
                first,
                last,
                rows,
            )

        share_rows(lambda a, b: share(begin + a, begin + b), end - begin, self.rows * self.columns)

    def _few(self, x: Tensor) -> Tensor:
        count = len(x)
        batch = 1 if count == 1 else 4
        whole = -(-count // batch) * batch
        entering = np.zeros((whole, self.columns), np.float32)
        entering[:count, : self.shape[1]] = x.numpy()
        out = np.empty((whole, self.blocks * self.rows), np.float32)
        sums = np.empty((whole, self.scales.shape[1], LANES), np.float32)
        _sum_groups(entering, self.group, sums)
        flat = (entering.reshape(-1), sums.reshape(-1))

        def share(begin: int, end: int) -> None:
            _product(
                self.words, self.scales, self.zeros, self.bits, self.group, self.streams, self.columns, *flat, batch,
                begin, end, out,
            )  # fmt: skip

        share_rows(share, self.blocks, self.rows * self.columns)
        return torch.from_numpy(out[:count, : self.shape[0]])

    def _many(self, x: Tensor) -> Tensor:
        out, width = self.shape
        result = torch.empty((len(x), out), dtype=torch.float32)
        step = max(1, SLAB // (self.rows * self.columns))
        slab = torch.empty((min(step, self.blocks) * self.rows, self.columns), dtype=torch.float32)
        numbers = slab.numpy()
        for begin in range(0, self.blocks, step):
            end = min(begin + step, self.blocks)
            self.decode(begin, end, numbers)
            rows = slice(begin * self.rows, min(end * self.rows, out))
            result[:, rows] = x @ slab[: rows.stop - rows.start, :width].T
        return result


def pack_rows_of_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes [out, in] uint8 -> words uint32 [blocks, streams, columns]."""
    layout, (out, width) = LAYOUTS[bits], codes.shape
    blocks = -(-out // layout.rows)
    words = np.zeros((blocks, layout.streams, -(-width // LANES) * LANES), np.uint32)
    table = [
        (row, take.word, *_place(take.down, take.mask, take.up)) for row in range(layout.rows)
        for take in layout.takes(row)
    ]  # fmt: skip
    _pack(codes, np.array(table, np.int64), layout.rows, words)
    return words


def multiply_floats(weights: Tensor, x: Tensor) -> Tensor:
    """x float32 [inputs, in] @ weights.T for bfloat16 or float16 weights [out, in], float32 [inputs, out].

    Weights are widened as they are read.
    """
    (out, width), count = weights.shape, len(x)
    batch = 1 if count == 1 else 4
    whole = -(-count // batch) * batch
    entering = np.zeros((whole, width), np.float32)
    entering[:count] = x.numpy()
    result = np.empty((whole, out), np.float32)
    stored, flat = stored_bits(weights).reshape(-1), entering.reshape(-1)
    share_rows(lambda begin, end: _float_rows(stored, width, flat, batch, begin, end, result), out, width)
    return torch.from_numpy(result[:count])


def _place(down: int, mask: int | None, up: int) -> tuple[int, int, int]:
    """(bits of the code to take off, mask of what is left, shift into the word) of a `Take`, for the way back."""
    if mask is None:
        return up, (1 << 32 - down) - 1, down
    low = (mask & -mask).bit_length() - 1
    return up, mask >> low, down + low


@_jit
def _pack(codes, table, rows, words):  # type: ignore[no-untyped-def]
    out, width = codes.shape
    for block in range(words.shape[0]):
        for entry in range(table.shape[0]):
            row = block * rows + table[entry, 0]
            if row < out:
                off, mask, shift = np.uint32(table[entry, 2]), np.uint32(table[entry, 3]), np.uint32(table[entry, 4])
                line, stored = words[block, table[entry, 1]], codes[row]
                for column in range(width):
                    line[column] |= np.uint32(np.uint32(np.uint32(stored[column]) >> off) & mask) << shift


@_jit
def _sum_groups(x, group, sums):  # type: ignore[no-untyped-def]
    sums[:] = 0
    for each in range(x.shape[0]):
        for part in range(sums.shape[1]):
            line = sums[each, part]
            for column in range(part * group, min((part + 1) * group, x.shape[1]), 8):
                for lane in range(8):
                    line[lane] += x[each, column + lane]


@_jit
def _load_group(scales, zeros, block, part, middle, scale, zero):  # type: ignore[no-untyped-def]
    for row in range(scales.shape[2]):
        scale[row] = value_of(scales[block, part, row])
        zero[row] = np.float32(zeros[block, part, row]) if zeros.size else middle


@_jit
def _product(words, scales, zeros, bits, group, streams, columns, x, sums, batch, begin, end, out):  # type: ignore[no-untyped-def]
    rows, groups = scales.shape[2], scales.shape[1]
    scale, zero = np.empty(rows, np.float32), np.empty(rows, np.float32)
    total = np.empty(rows * batch * 8, np.float32)
    middle, gap = np.float32(1 << (bits - 1)), groups * 8
    for block in range(begin, end):
        for each in range(0, out.shape[0], batch):
            total[:] = 0
            for part in range(groups):
                _load_group(scales, zeros, block, part, middle, scale, zero)
                first = part * group
                steps = (min(first + group, columns) - first) // 8
                at, xa, s = block * streams * columns + first, each * columns + first, (each * groups + part) * 8
                if batch == 1 and bits == 4:
                    add_group(words, at, columns, x, xa, columns, steps, sums, s, gap, scale, zero, total, 4, 1)
                elif batch == 1 and bits == 8:
                    add_group(words, at, columns, x, xa, columns, steps, sums, s, gap, scale, zero, total, 8, 1)
                elif batch == 1 and bits == 2:
                    add_group(words, at, columns, x, xa, columns, steps, sums, s, gap, scale, zero, total, 2, 1)
                elif batch == 1:
                    add_group(words, at, columns, x, xa, columns, steps, sums, s, gap, scale, zero, total, 3, 1)
                elif bits == 4:
                    add_group(words, at, columns, x, xa, columns, steps, sums, s, gap, scale, zero, total, 4, 4)
                elif bits == 8:
                    add_group(words, at, columns, x, xa, columns, steps, sums, s, gap, scale, zero, total, 8, 4)
                elif bits == 2:
                    add_group(words, at, columns, x, xa, columns, steps, sums, s, gap, scale, zero, total, 2, 4)
                else:
                    add_group(words, at, columns, x, xa, columns, steps, sums, s, gap, scale, zero, total, 3, 4)
            for row in range(rows):
                for other in range(batch):
                    found = np.float32(0)
                    for lane in range(8):
                        found += total[(row * batch + other) * 8 + lane]
                    out[each + other, block * rows + row] = found * _unscaled(bits, row)


@_jit
def _unscaled(bits, row):  # type: ignore[no-untyped-def]
    """1 / LAYOUTS[bits].factor(row)"""
    each = 10 if bits == 3 else 32 // bits
    down = bits * (row % each)
    return np.float32(1) if down + bits == 32 or row >= 30 else np.float32(1) / np.float32(1 << down)


@_jit
def _decode(words, scales, zeros, bits, group, streams, columns, begin, end, out):  # type: ignore[no-untyped-def]
    rows = scales.shape[2]
    scale, zero = np.empty(rows, np.float32), np.empty(rows, np.float32)
    middle = np.float32(1 << (bits - 1))
    for block in range(begin, end):
        for part in range(scales.shape[1]):
            _load_group(scales, zeros, block, part, middle, scale, zero)
            first = part * group
            steps = (min(first + group, columns) - first) // 8
            at, to = block * streams * columns + first, (block - begin) * rows * columns + first
            if bits == 4:
                spread_group(words, at, columns, steps, scale, zero, out, to, columns, 4)
            elif bits == 8:
                spread_group(words, at, columns, steps, scale, zero, out, to, columns, 8)
            elif bits == 2:
                spread_group(words, at, columns, steps, scale, zero, out, to, columns, 2)
            else:
                spread_group(words, at, columns, steps, scale, zero, out, to, columns, 3)


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
