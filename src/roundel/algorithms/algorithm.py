"""What an algorithm is: it chooses codes for the layers of a unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

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


class Algorithm(Protocol):
    """A frozen dataclass that inherits from this: its fields are the hyperparameters and their defaults.

    Fields are int, float, bool, str or None unions of these, so that they can stand in a recipe and on a command line;
    `__post_init__` raises RecipeError for a value that makes no sense.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    @property
    def reads_activations(self) -> bool:
        """False for all algorithms and transforms of a plan: no model is ever built."""

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
    def reads_float_stream(self) -> bool:
        """Whether it asks for the streams "float" and "target" beside "quantized"."""
        return False

    @property
    def blocks_at_a_time(self) -> int:
        """Decoder blocks that make a unit: their layers are handed to `quantize` together."""
        return 1

    @property
    def permutes(self) -> bool:
        """Whether columns are put into groups that do not lie side by side, so that a format must store an index."""
        return False

    def passes(self, samples: int, batch: int) -> float:
        """What it costs, in forward passes of a unit over all samples; a backward pass counts two. For estimates."""
        return 1.0 if self.reads_activations else 0.0

    @property
    def copies(self) -> float:
        """Float32 copies of a unit's weights, or what takes as much, that are held beside these. For estimates."""
        return 0.25

    def learns_on(self, batch: int, part: int) -> int:
        """Samples it runs forward and backward at once, where a step has `batch` and `part` are run together; 0 where
        it only runs forward. For estimates."""
        return 0

    def refuse(self, layer: Layer) -> str | None:
        """Why this layer is out of reach, or None. Asked at plan time."""

    def quantize(self, unit: Unit) -> dict[str, Rounded]:
        """One result for each of unit.layers, by layer name. Returns values; changes nothing."""


def misfit(layer: Layer) -> str | None:
    """Why a layer's rows do not divide into the blocks of its scheme, where these cannot be cut short, or None."""
    whole = layer.scheme.weight.row_columns
    if layer.shape[1] % whole == 0:
        return None
    return f"{layer.scheme.name} takes rows of whole blocks of {whole}, not of {layer.shape[1]}"
