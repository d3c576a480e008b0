"""Matrices on every grid that is executed, and what their decoded product is."""

from __future__ import annotations

import torch
from torch import Tensor

from roundel.scheme import Scheme
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer, Stored

__all__ = ["drawn", "layer_of", "reference"]

SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def layer_of(scheme: Scheme, shape: tuple[int, int]) -> Layer:
    """A layer stored on a scheme's grid."""
    stored = Stored(format="auto_round", scheme=scheme)
    return Layer(name="block.proj", shape=shape, dtype="BF16", scheme=scheme, stored=stored)


def drawn(scheme: Scheme, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    """Random codes over the whole range, scales of both signs, and zero points, on an integer grid."""
    grid, generator = scheme.weight, torch.Generator().manual_seed(seed)
    assert isinstance(grid.scale, str)
    low, high, blocks = int(grid.element.lo), int(grid.element.hi), grid.blocks(shape)
    codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int16)
    scale = torch.randn(blocks, generator=generator) * 0.01
    zero = None if grid.symmetric else torch.randint(0, high + 1, blocks, generator=generator, dtype=torch.uint8)
    kind = torch.int8 if grid.symmetric else torch.uint8
    return QuantizedTensor(grid=grid, codes=codes.to(kind), scale=scale.to(SCALES[grid.scale]), zero=zero)


def reference(weights: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x @ weights.T + bias in float64, and what its sums' rounding is measured by: |x| @ |weights|.T + |bias|."""
    wide, entering = weights.double(), x.double()
    size, exact = entering.abs() @ wide.abs().T, entering @ wide.T
    if bias is None:
        return exact, size
    return exact + bias.double(), size + bias.double().abs()
