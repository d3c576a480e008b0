"""Decoding in numba: one pass over the codes, written once. See `ops.decode`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from roundel.ops.numba.compiling import jit
from roundel.ops.numba.rows import share_rows
from roundel.tensor import QuantizedTensor, code_values, plain

__all__ = ["decode_by_kernel"]


def decode_by_kernel(quantized: QuantizedTensor, room: Tensor | None = None) -> Tensor:
    """`QuantizedTensor.decode` for a matrix on CPU whose blocks' columns lie side by side; in `room`, if given."""
    grid, (out, width) = quantized.grid, quantized.shape
    block = grid.block_of((out, width))
    scale = plain(quantized.scale).contiguous()
    zero = torch.zeros_like(scale) if quantized.zero is None else quantized.zero.float().contiguous()
    offset = None if quantized.offset is None else plain(quantized.offset).contiguous()
    weights = torch.empty((out, width), dtype=torch.float32) if room is None else room
    codes, meaning = quantized.codes.contiguous(), None
    if not grid.element.is_integer:
        codes = codes.view(torch.uint8)
        every = torch.arange(256, dtype=torch.uint8)
        count = 256 if grid.element.values is None else len(grid.element.values)
        meaning = code_values(every[:count].view(quantized.codes.dtype), grid).numpy()
    arrays = (scale.numpy(), zero.numpy(), (scale if offset is None else offset).numpy(), offset is not None)
    stored, filled = codes.numpy(), weights.numpy()

    def rows(begin: int, end: int) -> None:
        if meaning is None:
            _decode_integers(stored, *arrays, *block, begin, end, filled)
        else:
            _decode_table(stored, meaning, *arrays, *block, begin, end, filled)

    share_rows(rows, out, width)
    return weights


@jit
def _decode_integers(codes, scale, zero, offset, has_offset, block_rows, columns, begin, end, out):  # type: ignore[no-untyped-def]
    width = codes.shape[1]
    for row in range(begin, end):
        for block in range(scale.shape[1]):
            start = block * columns
            n = min(columns, width - start)
            at = row // block_rows
            s, z, o = scale[at, block], zero[at, block], offset[at, block]
            code, filled = codes[row, start : start + n], out[row, start : start + n]
            for i in range(n):
                filled[i] = (np.float32(code[i]) - z) * s
            if has_offset:
                for i in range(n):
                    filled[i] += o


@jit
def _decode_table(codes, meaning, scale, zero, offset, has_offset, block_rows, columns, begin, end, out):  # type: ignore[no-untyped-def]
    width = codes.shape[1]
    for row in range(begin, end):
        for block in range(scale.shape[1]):
            start = block * columns
            n = min(columns, width - start)
            at = row // block_rows
            s, z, o = scale[at, block], zero[at, block], offset[at, block]
            code, filled = codes[row, start : start + n], out[row, start : start + n]
            for i in range(n):
                filled[i] = (meaning[code[i]] - z) * s
            if has_offset:
                for i in range(n):
                    filled[i] += o
