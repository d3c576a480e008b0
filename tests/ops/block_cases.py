"""Weights and stored numbers that block types are tried on."""

from __future__ import annotations

import torch
from torch import Tensor

from ops.cases import KINDS, weights
from roundel.ops.blocks import StoredBlocks
from roundel.scheme import BLOCK_GRIDS, Grid

MATRICES = (*KINDS, "sparse", "tails")


def matrix(kind: str, shape: tuple[int, int]) -> Tensor:
    """Seeded float32 weights of one kind."""
    generator = torch.Generator().manual_seed(shape[1])
    if kind == "sparse":  # zeros, and blocks of one value
        found = weights("normal", shape, torch.float32)
        found[:, ::3] = 0
        found[0, :128], found[0, 128:256], found[-1, :256] = 0.01, -0.01, 0
        return found
    if kind == "tails":
        drawn = torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=1e-3)
        return 0.01 * drawn
    return weights(kind, shape, torch.float32)


def importance_of(width: int) -> Tensor:
    """[in] importances over some orders of magnitude, some of them 0."""
    drawn = torch.exp(1.5 * torch.randn(width, generator=torch.Generator().manual_seed(width)))
    drawn[::37] = 0
    return drawn


def random_stored(name: str, shape: tuple[int, int]) -> StoredBlocks:
    """Any numbers that a block type can hold."""
    grid, generator = BLOCK_GRIDS[name], torch.Generator().manual_seed(shape[0])

    def numbers(grid: Grid, size: tuple[int, int]) -> Tensor:
        count = 3 if grid.element.name == "ternary" else 1 << grid.element.bits
        return torch.randint(0, count, size, generator=generator, dtype=torch.uint8)

    def halves(size: tuple[int, int]) -> Tensor:
        return torch.randn(size, generator=generator).half()

    blocks = grid.blocks(shape)
    codes = numbers(grid, shape)
    if grid.scale == "E8M0":
        scale = torch.randint(0, 255, blocks, generator=generator, dtype=torch.uint8)
        return StoredBlocks(codes=codes, scale=scale)
    if not isinstance(grid.scale, Grid):
        return StoredBlocks(codes=codes, scale=halves(blocks), low=halves(blocks) if grid.offset else None)
    supers = (shape[0], shape[1] // 256)
    levels = numbers(grid.scale, blocks)
    if not isinstance(grid.offset, Grid):
        return StoredBlocks(codes=codes, scale=halves(supers), levels=levels)
    low_levels = numbers(grid.offset, blocks)
    return StoredBlocks(codes=codes, scale=halves(supers), low=halves(supers), levels=levels, low_levels=low_levels)
