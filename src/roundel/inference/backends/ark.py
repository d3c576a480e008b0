"""CPU: integers of 2 to 8 bits, through the kernels of auto-round-lib (`auto_round_kernel`), which repacks them.

The call is that of auto-round's own linear layer (auto_round_kernel/qlinear.py of auto-round-lib 0.16.0), but for the
dtype that is computed in: "fp32" here, for "auto" may round inputs on processors that have instructions for it. The
library is made for x86. It knows XPUs as well, where its linear layer asks for 8-bit products: those are refused.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from roundel.inference.backends.backend import missing
from roundel.inference.gradient import Kernel
from roundel.inference.grouping import side_by_side
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer

__all__ = ["Ark"]

COMPUTED, SCALES = "fp32", "fp32"  # as the library spells dtypes


class Ark:
    """auto-round-lib's packed integers on a CPU."""

    name: ClassVar[str] = "ark"
    priority: ClassVar[int] = 5

    @property
    def needs(self) -> str | None:
        return missing("auto_round_kernel", "ark")

    def refuse(self, layer: Layer, device: str) -> str | None:
        grid = layer.scheme.weight
        if device == "xpu":
            return "on xpu it multiplies in 8 bits, which rounds inputs"
        if device != "cpu":
            return f"it runs on cpu, not on {device}"
        if not grid.is_integer_in_groups:
            return f"it multiplies integers in groups, {layer.scheme.name} is none"
        return None

    def make(self, layer: Layer, quantized: QuantizedTensor) -> Kernel:
        return Blob(quantized)


class Blob(Kernel):
    """A weight as the library packs it, scales of 32 bits included."""

    def __init__(self, quantized: QuantizedTensor) -> None:
        import auto_round_kernel

        super().__init__()
        self._kernel = auto_round_kernel.woqgemm
        (out, width), bits = quantized.shape, quantized.grid.element.bits
        self.shape, middle = (out, width), 1 << (bits - 1)
        group = quantized.grid.block_of(self.shape)[1]
        codes, order = side_by_side(quantized, Ark.name)
        zeros = torch.empty(0, dtype=torch.int8)
        if quantized.zero is not None:  # both are moved to where signed bytes hold them: differences stay
            codes, zeros = (codes - middle).view(torch.int8), (quantized.zero - middle).view(torch.int8).T.contiguous()
        assert isinstance(quantized.scale, Tensor)
        self._kind = (COMPUTED, f"int{bits}", SCALES, quantized.zero is not None)
        packed = auto_round_kernel.repack_quantized_weight(
            codes.T.contiguous(), quantized.scale.float().T.contiguous(), zeros, group, *self._kind
        )
        self._call = (torch.empty(0), out, width, group, *self._kind)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""
        entering = x.detach().float()
        if self.order is not None:
            entering = entering[:, self.get_buffer("order")]
        found: Tensor = self._kernel(entering.contiguous(), self.packed, *self._call)
        return found.to(x.dtype)
