"""Packed matrices: made of codes, and multiplied by.

A few inputs are multiplied by codes in registers (few.py). For many, weights are decoded to float32, a slab of rows at
a time, and torch multiplies: a code is decoded once for all inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from roundel.inference.numba.emit import STEP, spread_group, widen
from roundel.inference.numba.few import FewInputs
from roundel.inference.numba.layout import FEW, LAYOUTS
from roundel.ops.numba.compiling import jit
from roundel.ops.numba.rows import share_rows

__all__ = ["PackedRows", "pack_rows_of_words"]

SLAB = 1 << 21  # weights decoded at a time for many inputs: 8 MB, which the last cache holds


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
        self._few = FewInputs(words, scales, zeros, bits, e2m1, group)
        self._kind = (bits, e2m1)
        self._stored = (*numbers, scales.shape[1], group, words.shape[1], self.columns)

    def product(self, x: Tensor) -> Tensor:
        """x float32 [inputs, in] -> x @ weight.T, float32 [inputs, out]."""
        if len(x) > FEW:
            return self._many(x)
        found = self._few.product(x)
        return found if found.shape[1] == self.shape[0] else found[:, : self.shape[0]]

    def decode(self, begin: int, end: int, slab: np.ndarray) -> None:
        """The weights of blocks begin .. end, into float32 [their rows, columns]."""
        run = _decode(*self._kind)

        def share(first: int, last: int) -> None:
            run(*self._stored, begin + first, begin + last, slab[first * self.rows :].reshape(-1))

        share_rows(share, end - begin, self._block_weights)

    @property
    def _block_weights(self) -> int:
        return self.rows * self.columns

    def back(self, gradient: Tensor) -> Tensor:
        """gradient float32 [inputs, out] -> gradient @ weight, float32 [inputs, in]."""
        found = torch.zeros((len(gradient), self.shape[1]), dtype=torch.float32)
        for rows, weights in self._slabs():
            found += gradient[:, rows] @ weights
        return found

    def _many(self, x: Tensor) -> Tensor:
        result = torch.empty((len(x), self.shape[0]), dtype=torch.float32)
        for rows, weights in self._slabs():
            result[:, rows] = x @ weights.T
        return result

    def _slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after others, and their weights, float32 [rows, in], which lie there until the next."""
        out, width = self.shape
        step = max(1, SLAB // self._block_weights)
        slab = torch.empty((min(step, self.blocks) * self.rows, self.columns), dtype=torch.float32)
        numbers = slab.numpy()
        for begin in range(0, self.blocks, step):
            end = min(begin + step, self.blocks)
            self.decode(begin, end, numbers)
            rows = slice(begin * self.rows, min(end * self.rows, out))
            yield rows, slab[: rows.stop - rows.start, :width]


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


@jit
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

    compiled: Callable[..., None] = jit(run)
    return compiled
