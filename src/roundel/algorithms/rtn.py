"""Round to nearest: each weight takes the nearest code of a grid fitted to its block's range. No data, no search.

ggml's block types are rounded as ggml does, which searches; with importances as its quantizer does with a file of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from roundel.algorithms.algorithm import Algorithm, Rounded, misfit
from roundel.algorithms.inputs import NOT_IN_FILE
from roundel.errors import RecipeError
from roundel.scheme import Grid
from roundel.unit import Layer, Unit

__all__ = ["Rtn"]


@dataclass(frozen=True)
class Rtn(Algorithm):
    """Plain rounding, half to even, in float32.

    imatrix   of ggml's types: llama.cpp's file of importances, for its own rounding with these
    """

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "round to nearest; no data, seconds"
    paper: ClassVar[str] = "the baseline of every paper; arithmetic as in roundel.ops.fit"

    imatrix: str | None = None

    def __post_init__(self) -> None:
        if self.imatrix == "true":
            raise RecipeError("rtn measures no importances: name a file of them, or choose --algorithm opt-rtn.")

    @property
    def reads_activations(self) -> bool:
        return False

    def refuse(self, layer: Layer) -> str | None:
        grid = layer.scheme.weight
        if grid.is_plain_integer or grid.rule == "ggml":
            known = grid.block[0] == 1
        elif grid.scale in ("E8M0", "F8_E4M3") or isinstance(grid.scale, Grid):
            known = grid.block[0] == 1 and grid.element.name in ("e0m3", "e2m1", "e4m3", "nf4", "fp4")
        else:
            known = grid.element.name == "e4m3" or grid.element.is_integer or grid.element.name in ("nf4", "fp4")
        if self.imatrix is not None and grid.rule != "ggml":
            return f"rtn counts importances for ggml's types alone, not for {layer.scheme.name}; opt-rtn does"
        return misfit(layer) if known else f"rtn has no rule for {layer.scheme.name}"

    def quantize(self, unit: Unit) -> dict[str, Rounded]:
        return {layer.name: self._one(unit, layer) for layer in unit.layers}

    def _one(self, unit: Unit, layer: Layer) -> Rounded:
        from roundel.ops.encode import encode, encode_blocks

        weight, known = unit.weight(layer), unit.known.get(layer.name)
        if known is not None:
            return Rounded(tensor=encode_blocks(weight, layer.scheme.weight, known.mean_square.to(weight.device)))
        missing = None if self.imatrix is None else f"{NOT_IN_FILE}: rounded without importances"
        tensor = encode(weight, layer.scheme.weight, unit.reach.get(layer.name))
        return Rounded(tensor=tensor, fallback=missing)
