"""Weights -> codes on a grid. The definition of plain rounding (round to nearest, half to even)."""

from __future__ import annotations

import torch
from torch import Tensor

from roundel.ops.fit import (
    blocked,
    fit_asymmetric,
    fit_float_zero,
    fit_largest,
    fit_power_of_two,
    fit_symmetric,
    grouped,
)
from roundel.ops.minifloat import decode_e8m0, round_e0m3, round_e2m1, round_e4m3
from roundel.ops.table import TABLES, fit_table, round_table
from roundel.scheme import BLOCK_NAMES, Grid
from roundel.tensor import QuantizedTensor, below_each_other, plain

__all__ = ["encode", "encode_blocks", "encode_reference", "encode_scaled"]

SLAB = 1 << 18  # weights that are rounded at a time where there is no kernel
ROUND = {"e0m3": round_e0m3, "e2m1": round_e2m1, "e4m3": round_e4m3}


def encode(weight: Tensor, grid: Grid, reach: float | None = None) -> QuantizedTensor:
    """Round a matrix to a grid, with scales fitted to each block's range.

    weight   [out, in], any float dtype, finite; rounded as float32
    grid     integers, with zero points that are codes or floats, or without; e2m1, e4m3 or e0m3 with power-of-two
             scales; e2m1 with e4m3 scales and one float for the matrix (NVFP4), or none (MLX's); e4m3 with float
             scales (FP8); ggml's block types; bitsandbytes' tables. Blocks are (1, n) or (1, 0), of FP8 any
    reach    of NVFP4, the largest magnitude that the float for the matrix is to cover, where other matrices share it;
             None: the matrix' own
    """
    from roundel.ops import use_kernels

    if grid.rule == "ggml":
        return encode_blocks(weight, grid)

    if grid.has_float_zeros:  # no kernel: rows at a time, so that few are held as float32
        rows = max(1, SLAB // max(1, weight.shape[1]))
        return below_each_other(
            [encode_reference(weight[at : at + rows], grid) for at in range(0, max(1, len(weight)), rows)]
        )
    if use_kernels() and weight.device.type == "cpu" and weight.dtype != torch.float64:
        from roundel.ops.numba.tensors import encode_tensor

        found = encode_tensor(weight, grid)
        if found is not None:
            return found
    return encode_reference(weight, grid, reach)


def encode_blocks(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> QuantizedTensor:
    """`encode` to one of ggml's block types, as ggml rounds with and without importances [in] (`ops.blocks`)."""
    from roundel.ops.blocks import as_tensor, round_blocks

    name = BLOCK_NAMES[grid]
    return as_tensor(round_blocks(weight, name, importance), name)


def encode_reference(weight: Tensor, grid: Grid, reach: float | None = None) -> QuantizedTensor:
    """`encode` in plain torch, on any device."""
    out, width = weight.shape
    rows, columns = grid.block_of((out, width))
    if grid.element.name in TABLES:
        return encode_scaled(weight, grid, fit_table(grouped(weight.float(), columns), grid.scale))
    if not grid.element.is_integer and isinstance(grid.scale, str) and grid.scale != "E8M0":
        return encode_scaled(weight, grid, fit_largest(blocked(weight.float(), (rows, columns)), grid))
    assert rows == 1, "only FP8 has blocks of several rows"
    groups = grouped(weight.float(), columns)
    if isinstance(grid.scale, Grid):
        return encode_scaled(weight, grid, _fit_nvfp(groups, grid.scale, reach))
    if grid.scale == "E8M0":
        return encode_scaled(weight, grid, fit_power_of_two(groups, grid).view(torch.float8_e8m0fnu))
    if grid.zero == "float":
        return encode_scaled(weight, grid, *fit_float_zero(groups, grid.element.bits))
    if grid.symmetric:
        return encode_scaled(weight, grid, fit_symmetric(groups, grid.element.bits))
    return encode_scaled(weight, grid, *fit_asymmetric(groups, grid.element.bits, grid.lowest_zero))


def encode_scaled(
    weight: Tensor, grid: Grid, scale: Tensor | QuantizedTensor, zero: Tensor | None = None
) -> QuantizedTensor:
    """Round a matrix with scales and zero points that are given as they are stored; a block of scale 0, where
    that can be, becomes 0."""
    out, width = weight.shape
    rows, columns = grid.block_of((out, width))
    if rows > 1:
        assert not isinstance(scale, QuantizedTensor), "blocks of rows have float scales"
        steps = scale.float().repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :width]
        return QuantizedTensor(grid=grid, codes=ROUND[grid.element.name](weight.float() / steps), scale=scale)
    groups = grouped(weight.float(), columns)
    if grid.element.name in TABLES or isinstance(scale, QuantizedTensor) or grid.scale == "F8_E4M3":
        steps = plain(scale)
        scaled = groups * torch.where(steps == 0, 0.0, 1 / steps)[..., None]
    elif grid.scale == "E8M0":
        scaled = groups / decode_e8m0(scale.view(torch.uint8))[..., None]
    else:
        scaled = groups / scale.float()[..., None]
    if grid.element.is_integer:
        shift = 0.0 if zero is None else zero.float()[..., None]
        whole = torch.round(scaled + shift) if grid.zero == "float" else torch.round(scaled) + shift
        codes = whole.clamp(grid.element.lo, grid.element.hi).to(torch.int8 if zero is None else torch.uint8)
    elif grid.element.name in TABLES:
        codes = round_table(scaled, grid.element)
    else:
        codes = ROUND[grid.element.name](scaled)
    return QuantizedTensor(grid=grid, codes=codes.flatten(1)[:, :width].contiguous(), scale=scale, zero=zero)


def _fit_nvfp(groups: Tensor, grid: Grid, reach: float | None) -> QuantizedTensor:
    """NVFP4's scales: the largest weight of the matrix (or of those that share its float) gets the largest scale, 448,
    and each block's largest the code 6.

    The order of operations is auto-round's (max * (1/6), products by reciprocals), so that the bits are.
    """
    largest = groups.abs().amax(-1)
    whole = largest.amax()
    if reach is not None:
        whole = whole.clamp(min=reach)
    upscale = torch.where(whole > 0, 448.0 * 6.0 / whole, 0.0)
    codes = round_e4m3(upscale * (largest * (1.0 / 6.0)))
    outer = torch.where(whole > 0, 1 / upscale, 1.0).view(1, 1)
    return QuantizedTensor(grid=grid, codes=codes, scale=outer)
