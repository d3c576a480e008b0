"""fake: weights rounded and decoded again, in the source's dtype, under the source's names: for research.

Any program that loads the source loads this, and computes what the rounding costs, at the source's size. Inputs stay
as they are. The config says nothing of it, so it is read back as a float checkpoint; codes are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import GridError
from roundel.formats.format import Contents, Format, Found
from roundel.tensor import QuantizedTensor, TensorSpec, torch_dtype
from roundel.unit import Layer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fake"]


@dataclass(frozen=True)
class Fake(Format):
    """Plain floats on the grid."""

    name: ClassVar[str] = "fake"
    summary: ClassVar[str] = "rounded weights as plain floats, for research: whatever reads the source"
    keeps_codes: ClassVar[bool] = False

    def refuse(self, layer: Layer) -> str | None:
        return None

    def outputs(self, layer: Layer) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", layer.dtype, layer.shape),)

    def pack(self, layer: Layer, weight: QuantizedTensor) -> dict[str, Tensor]:
        return {"weight": weight.decode().to(torch_dtype(layer.dtype))}

    def unpack(self, layer: Layer, stored: Mapping[str, Tensor]) -> QuantizedTensor:
        raise GridError(f"{layer.name} is stored as plain floats, which have no codes")

    def config(self, contents: Contents) -> dict[str, object]:
        return {}

    def caveats(self, contents: Contents) -> tuple[str, ...]:
        if any(layer.scheme.input is not None for layer in contents.layers):
            return ("fake: inputs of layers are not rounded, which the scheme asks of a runtime",)
        return ()

    def recognize(self, quantization: Mapping[str, object]) -> Format | None:
        return None

    def find(self, module: str, parts: Mapping[str, TensorSpec]) -> Found | None:
        return None
