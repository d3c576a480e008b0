"""ggml's block types: weights -> codes, scales and minima, with the bits that ggml's own quantizer gives.

Without importance this is what `ggml_quantize_chunk` computes without an importance matrix, bit for bit; with
importance, what it computes with one. Source of the arithmetic: llama.cpp, ggml/src/ggml-quants.c, the
quantize_row_*_ref and *_impl functions. Not covered: the types that need a codebook (IQ1 to IQ3), NVFP4.

A *block* shares a scale; in the K types and IQ4_XS, the scales of 256 weights are whole numbers (levels) times one
float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from roundel.errors import GridError
from roundel.ops.block_search import (
    EMPTY,
    Affine,
    affine_fit,
    largest_in,
    levels_of,
    lowest_in,
    nearest_in,
    over,
    positive_fit,
    root,
    running_sum,
    signed_descent,
    signed_fit,
    table_fit,
)
from roundel.ops.minifloat import decode_e8m0
from roundel.scheme import BLOCK_GRIDS, Grid
from roundel.tensor import QuantizedTensor

__all__ = ["PLAIN", "WEIGHTED", "StoredBlocks", "as_stored", "as_tensor", "round_blocks", "round_blocks_reference"]

CHUNK = 1 << 18  # weights rounded at a time by the definition
PLAIN = {
    "Q2_K": Affine(first=-0.5, step=0.1, count=15, absolute=True),
    "Q4_K": Affine(first=-1.0, step=0.1, count=20),
    "Q5_K": Affine(first=-0.5, step=0.1, count=15),
}
WEIGHTED = Affine(first=-0.9, step=0.05, count=36)


@dataclass(frozen=True, kw_only=True)
class StoredBlocks:
    """The numbers of a block type as they are stored, each on its own: only their bits are not yet laid out.

    codes       [out, in] uint8: unsigned, for signed elements with half their range added, except 8-bit ones (int8)
    scale       [out, super-blocks or blocks] float16, for MXFP4 uint8
    low         like scale: the float16 minimum, or of the K types what is to be subtracted; else None
    levels      [out, blocks] uint8 whole-number scales, with half their range added likewise; else None
    low_levels  like levels: whole-number minima
    """

    codes: Tensor
    scale: Tensor
    low: Tensor | None = None
    levels: Tensor | None = None
    low_levels: Tensor | None = None


def _bias(grid: Grid) -> int:
    return int(-grid.element.lo) if grid.element.is_integer and grid.element.bits < 8 else 0


def _signed(stored: Tensor, grid: Grid) -> Tensor:
    """Stored numbers -> codes of the grid's element."""
    if grid.element.is_integer and grid.element.lo < 0:
        return (stored - _bias(grid)).view(torch.int8)
    return stored


def _unsigned(codes: Tensor, grid: Grid) -> Tensor:
    return codes.view(torch.uint8) + _bias(grid)


def as_tensor(stored: StoredBlocks, name: str) -> QuantizedTensor:
    """What stored numbers of a block type mean."""
    grid = BLOCK_GRIDS[name]
    codes = _signed(stored.codes, grid)
    if not isinstance(grid.scale, Grid) or stored.levels is None:
        scale = stored.scale.view(torch.float8_e8m0fnu) if grid.scale == "E8M0" else stored.scale
        return QuantizedTensor(grid=grid, codes=codes, scale=scale, offset=stored.low)
    scale_of = QuantizedTensor(grid=grid.scale, codes=_signed(stored.levels, grid.scale), scale=stored.scale)
    offset = None
    if isinstance(grid.offset, Grid) and stored.low_levels is not None and stored.low is not None:
        offset = QuantizedTensor(grid=grid.offset, codes=stored.low_levels, scale=-stored.low)
    return QuantizedTensor(grid=grid, codes=codes, scale=scale_of, offset=offset)


def as_stored(tensor: QuantizedTensor) -> StoredBlocks:
    """The inverse of `as_tensor`."""
    codes, scale, offset = _unsigned(tensor.codes, tensor.grid), tensor.scale, tensor.offset
    if not isinstance(scale, QuantizedTensor):
        assert not isinstance(offset, QuantizedTensor), "a minimum is as its scale is"
        return StoredBlocks(codes=codes, scale=scale.view(torch.uint8) if scale.itemsize == 1 else scale, low=offset)
    assert isinstance(scale.scale, Tensor), "two levels of scales"
    levels = _unsigned(scale.codes, scale.grid)
    if not isinstance(offset, QuantizedTensor):
        return StoredBlocks(codes=codes, scale=scale.scale, levels=levels)
    assert isinstance(offset.scale, Tensor), "two levels of minima"
    return StoredBlocks(codes=codes, scale=scale.scale, low=-offset.scale, levels=levels, low_levels=offset.codes)


def round_blocks(weight: Tensor, name: str, importance: Tensor | None = None) -> StoredBlocks:
    """A matrix as a block type, as ggml rounds it.

    weight       [out, in] float, finite; in divisible by the type's 32 or 256
    name         a key of BLOCK_GRIDS
    importance   [in] or [out, in], at least 0; Q8_0, MXFP4, TQ1_0 and TQ2_0 make no use of it
    Raises GridError for rows that do not divide into blocks.
    """
    from roundel.ops import use_kernels

    if weight.shape[1] % BLOCK_GRIDS[name].row_columns:
        raise GridError(f"{name} holds whole blocks of {BLOCK_GRIDS[name].row_columns}, not rows of {weight.shape[1]}")
    if use_kernels() and weight.device.type == "cpu" and weight.numel():
        from roundel.ops.numba.block_tensors import round_rows

        return round_rows(weight.detach().float().contiguous(), name, importance)
    return round_blocks_reference(weight, name, importance)


def round_blocks_reference(weight: Tensor, name: str, importance: Tensor | None = None) -> StoredBlocks:
    """`round_blocks` in plain torch, on any device."""
    grid = BLOCK_GRIDS[name]
    width = weight.shape[1]
    rows = max(1, CHUNK // max(1, width))
    parts = []
    for start in range(0, weight.shape[0], rows):
        x = weight[start : start + rows].float()
        counted = None
        if importance is not None:
            given = importance.to(x.device).float()
            counted = given.expand_as(x) if given.ndim == 1 else given[start : start + rows]
        parts.append(_rounded(x, name, grid, counted))
    return StoredBlocks(
        **{
            field: torch.cat([getattr(part, field) for part in parts])
            for field in StoredBlocks.__dataclass_fields__
            if getattr(parts[0], field) is not None
        }
    )


def _rounded(x: Tensor, name: str, grid: Grid, importance: Tensor | None) -> StoredBlocks:
    rows = x.shape[0]
    if isinstance(grid.scale, Grid):
        supers = x.reshape(-1, 256)
        counted = None if importance is None else importance.reshape(-1, 256)
        if grid.offset is not None:
            return _affine_super(supers, name, grid, counted, rows)
        if grid.element.is_integer:
            return _signed_super(supers, name, grid, counted, rows)
        return _table_super(supers, grid, counted, rows)
    blocks = x.reshape(-1, grid.block[1])
    if grid.element.name == "ternary" or name == "Q8_0":
        return _whole_steps(blocks, 1 if name != "Q8_0" else 127, rows)
    if name == "MXFP4":
        return _powers_of_two(blocks, grid, rows)
    if importance is not None or name == "IQ4_NL":
        return _searched(x, grid, importance)
    if grid.offset is not None:
        return _spanning(blocks, grid, rows)
    half = 1 << (grid.element.bits - 1)
    step = largest_in(blocks) / -half
    inverse = torch.where(step != 0, over(1, step), 0.0)
    codes = torch.trunc(blocks * inverse[:, None] + (half + 0.5)).clamp(max=2 * half - 1)
    return _stored(rows, codes, step)


def _stored(rows: int, codes: Tensor, scale: Tensor, low: Tensor | None = None) -> StoredBlocks:
    return StoredBlocks(
        codes=codes.to(torch.uint8).reshape(rows, -1),
        scale=scale.half().reshape(rows, -1),
        low=None if low is None else low.half().reshape(rows, -1),
    )


def _half_away(values: Tensor) -> Tensor:
    """The nearest whole numbers, half away from zero."""
    size = values.abs()
    down = torch.floor(size)
    return torch.copysign(torch.where(size - down >= 0.5, down + 1, down), values)


def _whole_steps(x: Tensor, largest: int, rows: int) -> StoredBlocks:
    """Q8_0, and with one step the ternary types, whose codes are indices."""
    step = x.abs().amax(-1) / largest
    inverse = torch.where(step != 0, over(1, step), 0.0)
    codes = _half_away(x * inverse[:, None])
    if largest == 1:
        return _stored(rows, codes + 1, step)
    return _stored(rows, codes.to(torch.int8).view(torch.uint8), step)


def _spanning(x: Tensor, grid: Grid, rows: int) -> StoredBlocks:
    """Q4_1 and Q5_1: the codes span the range of the block."""
    largest = int(grid.element.hi)
    low = lowest_in(x)
    step = (x.amax(-1) - low + 0.0) / largest  # not -0.0
    inverse = torch.where(step != 0, over(1, step), 0.0)
    codes = torch.trunc((x - low[:, None]) * inverse[:, None] + 0.5).clamp(max=largest)
    return _stored(rows, codes, step, low)


def _powers_of_two(x: Tensor, grid: Grid, rows: int) -> StoredBlocks:
    """MXFP4: the exponent of the OCP specification; of two values as near, the one of smaller index."""
    largest = x.abs().amax(-1)
    exponent = torch.where(largest > 0, torch.floor(torch.log2(largest)) - 2 + 127, 0.0).clamp(min=0).to(torch.uint8)
    assert grid.element.values is not None
    best, index = torch.full_like(x, torch.inf), torch.zeros_like(x)
    for code, value in enumerate(grid.element.values):
        error = (value * decode_e8m0(exponent)[:, None] - x).abs()
        index, best = torch.where(error < best, float(code), index), torch.where(error < best, error, best)
    return StoredBlocks(codes=index.to(torch.uint8).reshape(rows, -1), scale=exponent.reshape(rows, -1))


def _emphasis(x: Tensor, importance: Tensor, energy: Tensor) -> Tensor:
    """How much an error at each weight counts: its importance, times its size where it stands out. energy: [groups]."""
    return importance * root(energy[:, None] + x * x)


def _searched(x: Tensor, grid: Grid, importance: Tensor | None) -> StoredBlocks:
    """The simple types with importance, and IQ4_NL."""
    rows, width = x.shape
    blocks = x.reshape(-1, 32)
    if grid.element.values is not None:
        if importance is None:
            weight = blocks * blocks
        else:
            energy = running_sum(blocks * blocks) * (2 / 32)
            weight = _emphasis(blocks, importance.reshape(-1, 32), energy)
        scale = table_fit(blocks, weight, grid.element.values)
        inverse = torch.where(scale != 0, over(1, scale), 0.0)
        return _stored(rows, nearest_in(inverse[:, None] * blocks, grid.element.values), scale)
    assert importance is not None
    weight = _emphasis(x, importance, running_sum(x * x) / width).reshape(-1, 32)
    if grid.offset is None:
        scale, codes = signed_fit(blocks, weight, 1 << (grid.element.bits - 1))
        return _stored(rows, codes, scale)
    scale, low, codes = affine_fit(blocks, weight, int(grid.element.hi), WEIGHTED)
    return _stored(rows, codes, scale, -low)


def _affine_super(x: Tensor, name: str, grid: Grid, importance: Tensor | None, rows: int) -> StoredBlocks:
    """Q2_K, Q4_K, Q5_K. x: [super-blocks, 256]."""
    assert isinstance(grid.scale, Grid)
    n, largest, top = grid.block[1], int(grid.element.hi), int(grid.scale.element.hi)
    blocks = x.reshape(-1, n)
    if importance is None:
        size = blocks.abs()
        weight = size if name == "Q2_K" else root(running_sum(blocks * blocks) / n)[:, None] + size
        scale, low, codes = affine_fit(blocks, weight, largest, PLAIN[name])
        scale, low = (each.reshape(-1, 256 // n) for each in (scale, low))
        step, levels = _top_levels(scale, top)
        base, low_levels = _top_levels(low, top)
    else:
        energy = running_sum(x * x) / 256 if name == "Q2_K" else 2 * running_sum(x * x) / 256
        weight = _emphasis(x, importance, energy).reshape(-1, n)
        scale, low, codes = affine_fit(blocks, weight, largest, WEIGHTED)
        scale, low, total = (each.reshape(-1, 256 // n) for each in (scale, low, running_sum(weight)))
        step, levels = positive_fit(scale, total, top)
        base, low_levels = positive_fit(low, total, top)
    step, base = step.half(), base.half()
    steps, lows = (step.float()[:, None] * levels).reshape(-1, 1), (base.float()[:, None] * low_levels).reshape(-1, 1)
    codes = torch.where(steps != 0, levels_of((blocks + lows) / steps, 0, largest), codes)
    return StoredBlocks(
        codes=codes.to(torch.uint8).reshape(rows, -1),
        scale=step.reshape(rows, -1),
        low=base.reshape(rows, -1),
        levels=levels.to(torch.uint8).reshape(rows, -1),
        low_levels=low_levels.to(torch.uint8).reshape(rows, -1),
    )


def _top_levels(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Levels 0 ... top of values [super-blocks, blocks], of which the largest gets the top one; and its step."""
    high = values.amax(-1).clamp(min=0) + 0.0  # not -0.0
    inverse = torch.where(high > 0, over(top, high), 0.0)
    return high / top, torch.round(inverse[:, None] * values).clamp(max=top)


def _signed_super(x: Tensor, name: str, grid: Grid, importance: Tensor | None, rows: int) -> StoredBlocks:
    """Q3_K, Q6_K. x: [super-blocks, 256]."""
    assert isinstance(grid.scale, Grid)
    half, top = int(-grid.element.lo), int(-grid.scale.element.lo)
    blocks = x.reshape(-1, 16)
    if name == "Q3_K" and importance is None:
        scale, codes = signed_descent(blocks, half)
    else:
        if importance is None:
            weight = blocks * blocks
        elif name == "Q3_K":
            weight = _emphasis(x, importance, 2 * running_sum(x * x) / 256).reshape(-1, 16)
        else:
            weight = importance.reshape(-1, 16)
        scale, codes = signed_fit(blocks, weight, half)
    scale = scale.reshape(-1, 16)
    if name == "Q3_K" and importance is not None:
        step, levels = signed_fit(scale, running_sum(weight).reshape(-1, 16), top)
    else:
        edge = largest_in(scale)
        inverse = over(-top, edge)
        levels = levels_of(inverse[:, None] * scale, -top, top - 1) + top
        step, empty = over(1, inverse), edge.abs() < EMPTY if name == "Q6_K" else edge == 0
        step = torch.where(empty, 0.0, step)
        levels = torch.where(empty[:, None], float(top if name == "Q6_K" else 0), levels)
        codes = torch.where(empty.repeat_interleave(16)[:, None] & (name == "Q6_K"), 0.0, codes)
    step = step.half()
    steps = (step.float()[:, None] * (levels - top)).reshape(-1, 1)
    codes = torch.where(steps != 0, levels_of(blocks / steps, -half, half - 1) + half, codes)
    held = levels.to(torch.uint8)
    return StoredBlocks(
        codes=codes.to(torch.uint8).reshape(rows, -1),
        scale=step.reshape(rows, -1),
        levels=(held + 128 if name == "Q6_K" else held).reshape(rows, -1),
    )


def _table_super(x: Tensor, grid: Grid, importance: Tensor | None, rows: int) -> StoredBlocks:
    """IQ4_XS. x: [super-blocks, 256]."""
    assert grid.element.values is not None
    blocks = x.reshape(-1, 32)
    if importance is None:
        weight = blocks * blocks
    else:
        weight = _emphasis(x, importance, running_sum(x * x) * (2 / 256)).reshape(-1, 32)
    scale = table_fit(blocks, weight, grid.element.values).reshape(-1, 8)
    step = -largest_in(scale) / 32
    inverse = torch.where(step != 0, over(1, step), 0.0)
    levels = levels_of(inverse[:, None] * scale, -32, 31)
    steps = (step[:, None] * levels).reshape(-1, 1)  # not of the float16 that is stored
    codes = nearest_in(torch.where(steps != 0, over(1, steps), 0.0) * blocks, grid.element.values)
    return StoredBlocks(
        codes=codes.to(torch.uint8).reshape(rows, -1),
        scale=step.half().reshape(rows, -1),
        levels=(levels + 32).to(torch.uint8).reshape(rows, -1),
    )
