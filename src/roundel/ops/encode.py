"""Weights -> codes on a grid. The definition of plain rounding (round to nearest, half to even)."""

from __future__ import annotations

import torch
from torch import Tensor

from roundel.ops.fit import fit_asymmetric, fit_power_of_two, fit_symmetric, grouped
from roundel.ops.minifloat import decode_e8m0, round_e2m1, round_e4m3
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor

__all__ = ["encode", "encode_reference"]


def encode(weight: Tensor, grid: Grid) -> QuantizedTensor:
    """Round a matrix to a grid, with scales fitted to each block's range.

    weight   [out, in], any float dtype, finite; rounded as float32
    grid     integers, or e2m1 / e4m3 with power-of-two scales; blocks are (1, n) or (1, 0)
    """
    from roundel.ops import use_kernels

    if use_kernels() and weight.device.type == "cpu" and weight.dtype != torch.float64:
        from roundel.ops.numba.tensors import encode_tensor

        found = encode_tensor(weight, grid)
        if found is not None:
            return found
    return encode_reference(weight, grid)


def encode_reference(weight: Tensor, grid: Grid) -> QuantizedTensor:
    """`encode` in plain torch, on any device."""
    out, width = weight.shape
    columns = grid.block_of((out, width))[1]
    groups = grouped(weight.float(), columns)
    if grid.scale == "E8M0":
        return _encode_mx(groups, grid, width)
    bits = grid.element.bits
    zero: Tensor | None = None
    if grid.symmetric:
        scale = fit_symmetric(groups, bits)
    else:
        scale, zero = fit_asymmetric(groups, bits, grid.lowest_zero)
    codes = torch.round(groups / scale.float()[..., None])
    if zero is not None:
        codes = codes + zero.float()[..., None]
    codes = codes.clamp(grid.element.lo, grid.element.hi).to(torch.uint8 if zero is not None else torch.int8)
    return QuantizedTensor(grid=grid, codes=codes.flatten(1)[:, :width].contiguous(), scale=scale, zero=zero)


def _encode_mx(groups: Tensor, grid: Grid, width: int) -> QuantizedTensor:
    exponents = fit_power_of_two(groups, grid)
    scaled = groups / decode_e8m0(exponents)[..., None]
    codes = round_e2m1(scaled) if grid.element.name == "e2m1" else round_e4m3(scaled)
    scale = exponents.view(torch.float8_e8m0fnu)
    return QuantizedTensor(grid=grid, codes=codes.flatten(1)[:, :width].contiguous(), scale=scale)
