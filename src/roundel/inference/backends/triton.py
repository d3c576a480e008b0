"""CUDA, XPU: integers of 2 to 8 bits, and MXFP4, in the lines of `inference/triton/layout.py`, decoded in registers.

One input is multiplied by a kernel of its own, more by tiles on the matrix units. Where groups are no multiples of 32
columns, scales are read for each weight and products are of float32: right, and slow.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from roundel.inference.backends.backend import missing
from roundel.inference.gradient import Kernel
from roundel.inference.grouping import side_by_side, unsigned
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer

__all__ = ["Triton"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Triton:
    """Packed integers and MXFP4 on a GPU."""

    name: ClassVar[str] = "triton"
    priority: ClassVar[int] = 20

    @property
    def needs(self) -> str | None:
        return missing("triton")

    def refuse(self, layer: Layer, device: str) -> str | None:
        grid = layer.scheme.weight
        if device not in ("cuda", "xpu"):
            return f"it runs on cuda and xpu, not on {device}"
        if not grid.is_integer_in_groups and not _is_mxfp4(grid):
            return f"it multiplies integers in groups, and MXFP4; {layer.scheme.name} is neither"
        if grid.element.bits == 1:
            return "it has no words of one bit"
        return None

    def make(self, layer: Layer, quantized: QuantizedTensor) -> Kernel:
        return Lines(quantized)


class Lines(Kernel):
    """A weight in lines. Numbers lie in integer buffers, so that changing the model's dtype changes none."""

    def __init__(self, quantized: QuantizedTensor) -> None:
        from roundel.inference.triton.layout import pack_lines

        super().__init__()
        grid, scale = quantized.grid, quantized.scale
        self.shape, self.bits, self.e2m1 = quantized.shape, grid.element.bits, not grid.element.is_integer
        self.group = grid.block_of(self.shape)[1]
        if scale.shape[1] == 1:  # so that a row of any length takes the fast way
            self.group = -(-self.group // 32) * 32
        codes, order = side_by_side(quantized, Triton.name)
        assert isinstance(scale, Tensor)
        self._scale = torch.uint8 if scale.dtype == torch.float8_e8m0fnu else scale.dtype
        none = torch.empty((0, 0), dtype=torch.uint8, device=codes.device)
        self.register_buffer("words", pack_lines(unsigned(codes, self.bits), self.bits), persistent=False)
        self.register_buffer("scales", scale.contiguous().view(torch.uint8), persistent=False)
        self.register_buffer("zeros", none if quantized.zero is None else quantized.zero.contiguous(), persistent=False)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""
        from roundel.inference.triton.product import multiply

        entering = x.detach()
        entering = entering if entering.dtype in DTYPES else entering.float()
        if self.order is not None:
            entering = entering[:, self.get_buffer("order")]
        scales = self.get_buffer("scales").view(self._scale)
        numbers = (self.get_buffer("words"), scales, self.get_buffer("zeros"))
        return multiply(entering, *numbers, self.shape, self.bits, self.group, self.e2m1).to(x.dtype)


def _is_mxfp4(grid: Grid) -> bool:
    return grid.is_mx and grid.element.name == "e2m1" and grid.block[0] == 1
