"""CPU: integers of 2 to 8 bits, MXFP4 and NVFP4, in the words of `inference/numba/layout.py`, which stay packed.

Up to 16 inputs are rounded to 16-bit integers and multiplied by codes in registers; for more, a slab of rows is decoded
to float32 at a time and torch multiplies. See `inference/numba/product.py` for how close that is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from roundel.inference.gradient import Kernel
from roundel.inference.grouping import side_by_side
from roundel.inference.numba.layout import LAYOUTS
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor, plain
from roundel.unit import Layer

if TYPE_CHECKING:
    from roundel.inference.numba.product import PackedRows

__all__ = ["Numba"]

COLUMNS = 16  # that are multiplied together, and lie in one group
_KINDS = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.uint32}  # as ops.numba.stored has them


class Numba:
    """Packed integers on a CPU."""

    name: ClassVar[str] = "numba"
    priority: ClassVar[int] = 10
    needs = None

    def refuse(self, layer: Layer, device: str) -> str | None:
        grid = layer.scheme.weight
        if device != "cpu":
            return f"it runs on cpu, not on {device}"
        if not grid.is_integer_in_groups and not _is_e2m1(grid):
            return f"it multiplies integers and E2M1 in groups, {layer.scheme.name} is neither"
        if grid.element.bits not in LAYOUTS:
            return f"it has words of {min(LAYOUTS)} to {max(LAYOUTS)} bits, not of {grid.element.bits}"
        columns = grid.block_of(layer.shape)[1]
        if columns % COLUMNS and columns < layer.shape[1]:
            return f"it takes groups of whole sixteens, not of {columns}"
        return None

    def make(self, layer: Layer, quantized: QuantizedTensor) -> Kernel:
        return Packed(quantized)


class Packed(Kernel):
    """A weight in words. Numbers lie in integer buffers, so that changing the model's dtype changes none."""

    def __init__(self, quantized: QuantizedTensor) -> None:
        from roundel.inference.numba.product import pack_rows_of_words

        super().__init__()
        self.shape, bits = quantized.shape, quantized.grid.element.bits
        self.bits, self.columns = bits, quantized.grid.block_of(self.shape)[1]
        codes, order = side_by_side(quantized, Numba.name)
        stored = codes.contiguous().view(torch.uint8).numpy()
        lowest = -(1 << (bits - 1)) if codes.dtype == torch.int8 else 0
        words = torch.from_numpy(pack_rows_of_words(stored, bits, lowest).view(np.int16))
        self.e2m1, self.factor = not quantized.grid.element.is_integer, 1.0
        scale = quantized.scale
        if self.e2m1:
            scale, self.factor = _narrow(scale)
        assert isinstance(scale, Tensor)
        self._kind = _KINDS[scale.dtype]
        scale = scale.view(torch.int32 if scale.dtype == torch.float32 else torch.int16)
        rows = LAYOUTS[bits].rows
        none = torch.empty((0, 0, 0), dtype=torch.uint8)
        zeros = none if quantized.zero is None else _by_blocks(quantized.zero, rows)
        self.register_buffer("words", words, persistent=False)
        self.register_buffer("scales", _by_blocks(scale, rows), persistent=False)
        self.register_buffer("zeros", zeros, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self._packed: PackedRows | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""
        entering = x if x.dtype == torch.float32 and not x.requires_grad else x.detach().float()
        if self.order is not None:
            entering = entering[:, self.get_buffer("order")]
        found = self._rows().product(entering)
        return (found if self.factor == 1 else found * self.factor).to(x.dtype)

    def back(self, gradient: Tensor) -> Tensor:
        found = self._rows().back(gradient.float()) * self.factor
        if self.order is not None:
            found = found[:, self.get_buffer("order").argsort()]
        return found.to(gradient.dtype)

    def _rows(self) -> PackedRows:
        if self._packed is None:
            self._packed = self._arrays()
        return self._packed

    def _arrays(self) -> PackedRows:
        """The buffers as the kernels take them."""
        from roundel.inference.numba.product import PackedRows

        return PackedRows(
            words=self.get_buffer("words").numpy().view(np.uint16),
            scales=self.get_buffer("scales").numpy().view(self._kind),
            zeros=self.get_buffer("zeros").numpy(),
            bits=self.bits,
            e2m1=self.e2m1,
            shape=self.shape,
            group=-(-self.columns // COLUMNS) * COLUMNS,  # a group of all columns may end within a vector
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        self._packed = None  # the buffers may be others
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, object]:
        """A copy has buffers of its own."""
        return self.__dict__ | {"_packed": None}


def _is_e2m1(grid: Grid) -> bool:
    """Whether it is E2M1 under scales that have 16 bits: powers of two (MXFP4), or E4M3 times one number (NVFP4)."""
    if grid.element.name != "e2m1" or grid.block[0] != 1 or grid.offset is not None or grid.rule != "range":
        return False
    inner = grid.scale
    return inner == "E8M0" or (
        isinstance(inner, Grid) and inner.element.name == "e4m3" and inner.block == (0, 0) and inner.offset is None
    )


def _narrow(scale: Tensor | QuantizedTensor) -> tuple[Tensor, float]:
    """Scales of E2M1 codes in 16 bits, exactly, and what products by them are multiplied by."""
    if isinstance(scale, QuantizedTensor):
        return scale.codes.float().to(torch.float16), float(plain(scale.scale)) / 2
    return scale.float().to(torch.bfloat16), 0.5


def _by_blocks(values: Tensor, rows: int) -> Tensor:
    """[out, groups] -> [blocks, groups, rows of a block], zeros where a block has no such row."""
    out, groups = values.shape
    full = torch.zeros((-(-out // rows) * rows, groups), dtype=values.dtype)
    full[:out] = values
    return full.view(-1, rows, groups).transpose(1, 2).contiguous()
