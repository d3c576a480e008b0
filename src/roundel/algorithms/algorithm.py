"""What an algorithm is: it chooses codes for the layers of a unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from roundel.step import Step
from roundel.tensor import QuantizedTensor
from roundel.unit import Inputs, Layer, Unit

__all__ = ["Algorithm", "Rounded", "misfit"]


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A layer's codes, and what choosing them came to.

    error      the algorithm's own objective with these codes: lower is better; None where it has none
    baseline   the same objective with plain rounding
    tokens     tokens that entered the layer; None where no data was looked at
    fallback   why plain rounding, or another way than the algorithm's, was taken; None where it was not
    note       another fact worth a line of the report
    inputs     what entered the layer, where that was measured
    """

    tensor: QuantizedTensor
    error: float | None = None
    baseline: float | None = None
    tokens: int | None = None
    fallback: str | None = None
    note: str | None = None
    inputs: Inputs | None = None


class Algorithm(Step, Protocol):
    """Chooses codes. See Step for what its fields are."""

    @property
    def measures_importances(self) -> bool:
        """Whether `Rounded.inputs` says what entered the layers, so that `--save-imatrix` has something to save."""
        return False

    @property
    def imatrix(self) -> bool | str | None:
        """Importances that weights are counted by: True where it measures them, the path of a file of llama.cpp's where
        they stand there (`Unit.known`), or none. Declared as a field it is a hyperparameter."""
        return None

    @property
    def blocks_at_a_time(self) -> int:
        """Decoder blocks that make a unit: their layers are handed to `quantize` together."""
        return 1

    @property
    def permutes(self) -> bool:
        """Whether columns are put into groups that do not lie side by side, so that a format must store an index."""
        return False

    @property
    def copies(self) -> float:
        return 0.25

    def quantize(self, unit: Unit) -> dict[str, Rounded]:
        """One result for each of unit.layers, by layer name. Returns values; changes nothing."""


def misfit(layer: Layer) -> str | None:
    """Why a layer's rows do not divide into the blocks of its scheme, where these cannot be cut short, or None."""
    whole = layer.scheme.weight.row_columns
    if layer.shape[1] % whole == 0:
        return None
    return f"{layer.scheme.name} takes rows of whole blocks of {whole}, not of {layer.shape[1]}"
