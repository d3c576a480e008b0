"""SmoothQuant: diagonal scales in closed form, from the largest inputs and the largest weights of each channel.

Source: Xiao et al., arXiv 2211.10438, equation 4:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

The paper rounds inputs and weights both; for weights alone the same scales give the channels with large inputs a
larger share of the grid. What it does not know: whether that pays. It takes no loss into account, unlike AWQ and TEQ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.errors import RecipeError
from roundel.transforms.absorb import absorb, storable
from roundel.transforms.inputs import Entering, columns_to_channels, enter, largest_weights
from roundel.transforms.proof import prove
from roundel.transforms.transform import Transform, Transformed
from roundel.unit import Layer, Space, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SmoothQuant", "smooth_scale"]


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Transform):
    """Closed-form scales.

    alpha   how much of a channel's size moves from the inputs to the weights, 0 to 1
    """

    alpha: float = 0.5

    name: ClassVar[str] = "smoothquant"
    summary: ClassVar[str] = "diagonal scales in closed form; one look at the data"
    paper: ClassVar[str] = "Xiao et al. 2022, arXiv 2211.10438"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha={self.alpha} is not possible: smoothquant takes 0 to 1.")

    @property
    def reads_activations(self) -> bool:
        return True

    def refuse(self, layer: Layer) -> str | None:
        return None

    def apply(self, unit: Unit) -> Transformed:
        proven, notes = prove(unit)
        seen = enter(proven, proven.spaces, "quantized")
        weights = unit.weights
        for space in proven.spaces:
            if seen[space.name].tokens == 0:
                notes[space.name] = "skipped: no token reached it"
                continue
            scale = storable(unit.weights, space, smooth_scale(unit, space, seen[space.name], self.alpha))
            weights = absorb(weights, space, scale)
            notes[space.name] = f"scaled by {float(scale.min()):.3g} to {float(scale.max()):.3g}"
        return Transformed(unit=replace(proven, weights=weights), notes=notes)


def smooth_scale(unit: Unit, space: Space, seen: Entering, alpha: float) -> Tensor:
    """s [size]. A channel that nothing enters, or that all its readers ignore, keeps its scale: 1."""
    import torch

    assert seen.peak is not None
    rounded = {layer.name for layer in unit.layers}
    readers = [reader for reader in space.readers if reader in rounded]
    inputs = columns_to_channels(space, seen.peak, largest=True)
    weights = columns_to_channels(space, largest_weights(unit.weights, readers), largest=True)
    scale = inputs**alpha / weights ** (1 - alpha)
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
