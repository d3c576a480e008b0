"""CUDA: symmetric integers of 4 and 8 bits, by the Marlin kernels that GPTQModel builds and calls.

As its `MarlinLinear` (7.7) takes them: float16 scales, which it rounds to bfloat16 for bfloat16 inputs; cards of
compute capability 7.5 and later. Never run on a card: what the class is given is tested.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from roundel.inference.backends.backend import missing
from roundel.inference.gptqmodel import Foreign, filled, refuse_foreign
from roundel.inference.gradient import Kernel
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer

__all__ = ["Marlin", "marlin_module"]

BITS = (4, 8)


class Marlin:
    """Marlin through GPTQModel."""

    name: ClassVar[str] = "marlin"
    priority: ClassVar[int] = 30

    @property
    def needs(self) -> str | None:
        return missing("gptqmodel")

    def refuse(self, layer: Layer, device: str) -> str | None:
        reason = refuse_foreign(layer, device, BITS)
        if reason is None and not layer.scheme.weight.symmetric:
            return "it multiplies symmetric integers"
        each = 32 // layer.scheme.weight.element.bits
        if reason is None and any(side % each for side in layer.shape):
            return f"it takes whole words, {each} outputs and {each} inputs each, not {list(layer.shape)}"
        return reason

    def make(self, layer: Layer, quantized: QuantizedTensor) -> Kernel:
        def build(parts: dict[str, Tensor]) -> nn.Module:
            made = marlin_module(layer, parts)
            made.post_init()  # type: ignore[operator]
            return made

        return Foreign(quantized, self.name, build)


def marlin_module(layer: Layer, parts: dict[str, Tensor]) -> nn.Module:
    """GPTQModel's class with a layer's words in it, not yet repacked."""
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    module: nn.Module = filled(MarlinLinear, layer, parts)
    return module
