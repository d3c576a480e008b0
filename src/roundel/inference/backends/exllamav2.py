"""CUDA: integers of 4 bits, symmetric and not, by ExLlama's second kernels, which GPTQModel builds and calls.

As its `ExllamaV2Linear` (7.7) takes them: outputs and inputs in thirty-twos, and products in float16, to which inputs
are rounded. Never run on a card: what the class is given is tested.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from roundel.inference.backends.backend import missing
from roundel.inference.gptqmodel import Foreign, filled, refuse_foreign
from roundel.inference.gradient import Kernel
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer

__all__ = ["Exllamav2", "exllamav2_module"]

SIDE = 32


class Exllamav2:
    """ExLlama v2 through GPTQModel."""

    name: ClassVar[str] = "exllamav2"
    priority: ClassVar[int] = 15

    def __init__(self) -> None:
        self._scratch: dict[torch.device, Any] = {}

    @property
    def needs(self) -> str | None:
        return missing("gptqmodel")

    def refuse(self, layer: Layer, device: str) -> str | None:
        reason = refuse_foreign(layer, device, (4,))
        if reason is None and any(side % SIDE for side in layer.shape):
            return f"it takes outputs and inputs in multiples of {SIDE}, not {list(layer.shape)}"
        return reason

    def make(self, layer: Layer, quantized: QuantizedTensor) -> Kernel:
        def build(parts: dict[str, Tensor]) -> nn.Module:
            made: Any = exllamav2_module(layer, parts)
            made.scratch = self._space(
                made.scratch_space_fixed(), quantized.codes.device
            )  # lives while the module does
            made.post_init(made.scratch)
            return made  # type: ignore[no-any-return]

        return Foreign(quantized, self.name, build)

    def _space(self, size: int, device: torch.device) -> Any:
        """Memory in which kernels decode, shared by the layers of a device."""
        from gptqmodel.utils.exllamav2 import ScratchSpace

        held = self._scratch.get(device)
        if held is None or held.scratch_bytes < size:
            self._scratch[device] = held = ScratchSpace(size, device)
        return held


def exllamav2_module(layer: Layer, parts: dict[str, Tensor]) -> nn.Module:
    """GPTQModel's class with a layer's words in it, not yet handed to its kernels."""
    from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear

    module: nn.Module = filled(ExllamaV2Linear, layer, parts)
    return module
