"""What an algorithm is: it chooses codes for the layers of a unit."""

from __future__ import annotations

from typing import ClassVar, Protocol

from roundel.tensor import QuantizedTensor
from roundel.unit import Layer, Unit

__all__ = ["Algorithm"]


class Algorithm(Protocol):
    """A frozen dataclass: its fields are the hyperparameters and their defaults."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    @property
    def reads_activations(self) -> bool:
        """False for all algorithms of a plan: no model is ever built."""

    def refuse(self, layer: Layer) -> str | None:
        """Why this layer is out of reach, or None. Asked at plan time."""

    def quantize(self, unit: Unit) -> dict[str, QuantizedTensor]:
        """One result for each of unit.layers, by layer name. Returns values; changes nothing."""
