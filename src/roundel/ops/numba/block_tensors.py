"""The kernels of block types for torch tensors: `ops.blocks.round_blocks` on CPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from roundel.ops.blocks import PLAIN, WEIGHTED, StoredBlocks
from roundel.ops.numba.blocks import (
    EMPHASIS,
    GIVEN,
    SIZE,
    SPREAD,
    SQUARE,
    energies_of,
    round_affine,
    round_signed,
    round_table,
)
from roundel.ops.numba.small_blocks import (
    round_nearest_value,
    round_spanning,
    round_symmetric,
    round_whole_steps,
)
from roundel.scheme import BLOCK_GRIDS, Grid

__all__ = ["round_rows"]


class _Importance(NamedTuple):
    """How a kernel is told what counts: the kind of weights, importance [1 or rows, in], energies of spans."""

    kind: int
    given: np.ndarray
    energies: np.ndarray


def round_rows(weight: Tensor, name: str, importance: Tensor | None) -> StoredBlocks:
    """`ops.blocks.round_blocks_reference` by kernel. weight: [rows, in] float32 on the CPU, contiguous, finite."""
    rows, grid = weight.numpy(), BLOCK_GRIDS[name]
    shape = (rows.shape[0], rows.shape[1])
    supers, found = isinstance(grid.scale, Grid), _empty(shape, grid)
    codes, scale, low, levels, low_levels = found
    known, element = _importance(rows, name, importance), grid.element
    largest = np.float32(element.hi)
    if element.name == "ternary":
        round_whole_steps(rows, 256, np.float32(1), np.float32(1), codes, scale)
    elif name == "Q8_0":
        round_whole_steps(rows, 32, np.float32(127), np.float32(0), codes, scale)
    elif name == "MXFP4":
        round_nearest_value(rows, np.array(element.values, np.float32), codes, scale)
    elif element.values is not None:
        table = np.array(element.values, np.float32)
        round_table(
            rows, *_searched(known), table[1:] + table[:-1], np.diff(table), table[0], supers, codes, scale, levels
        )
    elif not supers and known.kind != EMPHASIS:
        if grid.offset is None:
            round_symmetric(rows, np.float32(-element.lo), codes, scale)
        else:
            round_spanning(rows, largest, codes, scale, low)
    elif grid.offset is None:
        top = np.float32(-grid.scale.element.lo if isinstance(grid.scale, Grid) else 0)
        descends = name == "Q3_K" and known.kind == SQUARE
        half = np.float32(-element.lo)
        round_signed(rows, *_searched(known), grid.block[1], half, descends, top, codes, scale, levels)
    else:
        top = np.float32(grid.scale.element.hi if isinstance(grid.scale, Grid) else 0)
        trials = WEIGHTED if known.kind == EMPHASIS else PLAIN[name]
        factors = np.array(trials.factors(int(element.hi)), np.float32)
        search = (grid.block[1], largest, factors, trials.absolute, top)
        round_affine(rows, *_searched(known), *search, codes, scale, low, levels, low_levels)
    return StoredBlocks(
        codes=torch.from_numpy(codes),
        scale=torch.from_numpy(scale if name == "MXFP4" else scale.view(np.float16)),
        low=None if grid.offset is None else torch.from_numpy(low.view(np.float16)),
        levels=torch.from_numpy(levels) if supers else None,
        low_levels=torch.from_numpy(low_levels) if supers and grid.offset is not None else None,
    )


def _searched(known: _Importance) -> tuple[np.ndarray, np.ndarray, int]:
    return known.given, known.energies, known.kind


def _empty(shape: tuple[int, int], grid: Grid) -> tuple[np.ndarray, ...]:
    """codes, scale, low, levels, low levels: those that the grid has, the others without columns."""
    supers, rows, blocks = isinstance(grid.scale, Grid), shape[0], grid.blocks(shape)[1]
    halves = shape[1] // 256 if supers else blocks
    kind = np.uint8 if grid.scale == "E8M0" else np.uint16
    return (
        np.empty(shape, np.uint8),
        np.empty((rows, halves), kind),
        np.empty((rows, halves if grid.offset is not None else 0), np.uint16),
        np.empty((rows, blocks if supers else 0), np.uint8),
        np.empty((rows, blocks if supers and grid.offset is not None else 0), np.uint8),
    )


def _importance(rows: np.ndarray, name: str, importance: Tensor | None) -> _Importance:
    if importance is None:
        kind = {"Q2_K": SIZE, "Q4_K": SPREAD, "Q5_K": SPREAD}.get(name, SQUARE)
        return _Importance(kind, np.zeros((1, rows.shape[1]), np.float32), np.zeros(0, np.float32))
    given = importance.float().reshape(-1, rows.shape[1]).contiguous().numpy()
    if name == "Q6_K":
        return _Importance(GIVEN, given, np.zeros(0, np.float32))
    grid = BLOCK_GRIDS[name]
    span = 256 if isinstance(grid.scale, Grid) else 32 if grid.element.values is not None else rows.shape[1]
    energies = np.empty(rows.size // span, np.float32)
    if name != "MXFP4" and grid.element.name != "ternary":
        doubled = grid.element.values is not None or (isinstance(grid.scale, Grid) and name != "Q2_K")
        energies_of(rows.reshape(-1, span), 2 if doubled else 1, energies)
    return _Importance(EMPHASIS, given, energies)
