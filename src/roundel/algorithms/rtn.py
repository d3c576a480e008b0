"""Round to nearest: each weight takes the nearest code of a grid fitted to its block's range. No data, no search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from roundel.algorithms.algorithm import Algorithm, Rounded, misfit
from roundel.scheme import Grid
from roundel.unit import Layer, Unit

__all__ = ["Rtn"]


@dataclass(frozen=True)
class Rtn(Algorithm):
    """Plain rounding, half to even, in float32."""

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "round to nearest; no data, seconds"
    paper: ClassVar[str] = "the baseline of every paper; arithmetic as in roundel.ops.fit"

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
        return misfit(layer) if known else f"rtn has no rule for {layer.scheme.name}"

    def quantize(self, unit: Unit) -> dict[str, Rounded]:
        from roundel.ops.encode import encode

        found: dict[str, Rounded] = {}
        for layer in unit.layers:
            tensor = encode(unit.weight(layer), layer.scheme.weight, unit.reach.get(layer.name))
            found[layer.name] = Rounded(tensor=tensor)
        return found
