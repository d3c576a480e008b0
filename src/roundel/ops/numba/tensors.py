"""The kernels for torch tensors: `ops.encode` on CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from roundel.ops.numba.microscaling import mx_parameters, round_mx
from roundel.ops.numba.rounding import round_integer
from roundel.ops.numba.stored import BF16, F16, F32
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor

__all__ = ["encode_tensor", "stored_bits"]

_KINDS = {torch.bfloat16: BF16, torch.float16: F16, torch.float32: F32}


def encode_tensor(weight: Tensor, grid: Grid) -> QuantizedTensor | None:
    """`ops.encode` by kernel; None where no kernel fits (another grid, or weights that are not finite)."""
    if grid.block[0] != 1 or weight.numel() == 0 or not (grid.is_plain_integer or grid.is_mx):
        return None
    if weight.dtype not in _KINDS:
        return None
    stored = stored_bits(weight)
    if grid.element.is_integer:
        return _encode_integer(stored, grid)
    if weight.shape[1] % 32 or grid.exponent != "floor":
        return None
    return _encode_mx(stored, grid)


def stored_bits(weight: Tensor) -> np.ndarray:
    """A float32, bfloat16 or float16 tensor as the kernels take it; its memory is shared where it is contiguous."""
    kind = _KINDS[weight.dtype]
    return weight.detach().contiguous().view(torch.int32 if kind == F32 else torch.int16).numpy().view(kind)


def _encode_integer(stored: np.ndarray, grid: Grid) -> QuantizedTensor | None:
    shape = (stored.shape[0], stored.shape[1])
    columns, blocks = grid.block_of(shape)[1], grid.blocks(shape)
    codes, scales = np.empty(shape, np.uint8), np.empty(blocks, np.uint16)
    zeros, bits = np.empty(blocks, np.uint8), grid.element.bits
    bad = round_integer(stored, bits, columns, grid.symmetric, grid.lowest_zero, codes, scales, zeros, np.zeros(2))
    if bad >= 0:
        return None
    scale = torch.from_numpy(scales.view(np.float16))
    if grid.symmetric:
        signed = torch.from_numpy((codes - np.uint8(1 << (bits - 1))).view(np.int8))
        return QuantizedTensor(grid=grid, codes=signed, scale=scale)
    return QuantizedTensor(grid=grid, codes=torch.from_numpy(codes), scale=scale, zero=torch.from_numpy(zeros))


def _encode_mx(stored: np.ndarray, grid: Grid) -> QuantizedTensor | None:
    shape = (stored.shape[0], stored.shape[1])
    codes, exponents = np.empty(shape, np.uint8), np.empty(grid.blocks(shape), np.uint8)
    if round_mx(stored, *mx_parameters(grid.element.name, grid.element.hi), codes, exponents, np.zeros(2)) >= 0:
        return None
    found = torch.from_numpy(codes)
    return QuantizedTensor(
        grid=grid,
        codes=found if grid.element.name == "e2m1" else found.view(torch.float8_e4m3fn),
        scale=torch.from_numpy(exponents).view(torch.float8_e8m0fnu),
    )
