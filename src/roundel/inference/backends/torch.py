"""The reference: codes packed into bytes, decoded a slab of rows at a time for every product. Any device, any grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from roundel.formats import FORMATS, Format
from roundel.inference.gradient import Kernel
from roundel.inference.planes import join_planes, split_planes
from roundel.scheme import Element
from roundel.tensor import QuantizedTensor, plain
from roundel.unit import Layer

__all__ = ["Decoding", "Torch"]

DECODED = 1 << 22  # weights decoded at a time


class Torch:
    """Decode and multiply. On a CPU the product is computed in float32, elsewhere in the dtype of x."""

    name: ClassVar[str] = "torch"
    priority: ClassVar[int] = 0
    needs = None

    def refuse(self, layer: Layer, device: str) -> str | None:
        return None

    def make(self, layer: Layer, quantized: QuantizedTensor) -> Kernel:
        return Decoding(FORMATS[layer.stored.format], quantized)


class Decoding(Kernel):
    """A weight in packed bytes. Numbers lie in uint8 buffers, so that changing the model's dtype changes none."""

    def __init__(self, format: Format, quantized: QuantizedTensor) -> None:
        """format: the one that says which floats the codes mean to its readers."""
        super().__init__()
        self.format, self.grid, self.shape = format, quantized.grid, quantized.shape
        scale, offset = quantized.scale, quantized.offset
        if isinstance(scale, QuantizedTensor):  # one for each block, and they are few: kept as floats
            self.grid, scale = replace(self.grid, scale="F32"), plain(scale)
        if isinstance(offset, QuantizedTensor):
            self.grid, offset = replace(self.grid, offset="F32"), plain(offset)
        element = self.grid.element
        codes = quantized.codes.contiguous().view(torch.uint8)
        if _is_signed(element):
            codes = codes + (1 << (element.bits - 1))  # wraps around, as two's complement does
        self._planes = 0
        for plane in split_planes(codes, element.bits):
            self.register_buffer(f"plane{self._planes}", plane, persistent=False)
            self._planes += 1
        self._dtypes = {"codes": quantized.codes.dtype}
        self._keep("scale", scale)
        self._keep("zero", quantized.zero)
        self._keep("offset", offset)
        self._keep("group_index", quantized.group_index)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""
        entering = x.to(_computed(x))
        result = torch.empty((len(x), self.shape[0]), dtype=x.dtype, device=x.device)
        for rows, weights in self._slabs(entering.dtype):
            result[:, rows] = nn.functional.linear(entering, weights)
        return result

    def back(self, gradient: Tensor) -> Tensor:
        entering = gradient.to(_computed(gradient))
        found = torch.zeros((len(gradient), self.shape[1]), device=gradient.device)  # sums of slabs in float32
        for rows, weights in self._slabs(entering.dtype):
            found += entering[:, rows] @ weights
        return found.to(gradient.dtype)

    def _slabs(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after others, and their weights [rows, in]."""
        (out, width), block = self.shape, self.grid.block[0] or 1
        step = max(1, DECODED // width // block) * block
        for start in range(0, out, step):
            rows = slice(start, min(start + step, out))
            blocks = slice(start // block, -(-rows.stop // block)) if self.grid.block[0] else slice(0, 1)
            yield rows, self.format.decode(self._quantized(rows, blocks)).to(dtype)

    def rows(self, numbers: Tensor) -> Tensor:
        """Some rows of the weight, [numbers, in], where no two share a scale."""
        return self.format.decode(self._quantized(numbers, numbers))

    def _quantized(self, rows: slice | Tensor, blocks: slice | Tensor) -> QuantizedTensor:
        """These rows of the weight, and the blocks they are in."""
        element = self.grid.element
        planes = [self.get_buffer(f"plane{number}")[rows] for number in range(self._planes)]
        codes = join_planes(planes, element.bits, self.shape[1])
        if _is_signed(element):
            codes = codes - (1 << (element.bits - 1))
        scale = self._kept("scale", blocks)
        assert scale is not None
        return QuantizedTensor(
            grid=self.grid,
            codes=codes.view(self._dtypes["codes"]),
            scale=scale,
            zero=self._kept("zero", blocks),
            offset=self._kept("offset", blocks),
            group_index=self._kept("group_index", slice(None)),
        )

    def _keep(self, name: str, value: Tensor | None) -> None:
        if value is not None:
            self._dtypes[name] = value.dtype
            value = value.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # strides of one column, too
        self.register_buffer(name, value, persistent=False)

    def _kept(self, name: str, part: slice | Tensor) -> Tensor | None:
        return self.get_buffer(name).view(self._dtypes[name])[part] if name in self._dtypes else None


def _computed(x: Tensor) -> torch.dtype:
    """The dtype of products."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def _is_signed(element: Element) -> bool:
    return element.is_integer and element.lo < 0
