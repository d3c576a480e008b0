"""Optimized RTN: rounding to nearest with the scale (and zero point) of least squared error for each block.

The search is `ops.search`. Without data, all weights of a block count alike. With `imatrix` each counts as much as the
mean square of the input it meets: sum_j E[x_j^2] (w_j - decoded_j)^2 is the expected squared error of an output, if
inputs do not go together. Inputs are taken from the quantized stream: they are what the rounded layer will meet, and
the one stream that a plan has anyway; or from a file of llama.cpp, which needs no data. What correlated inputs would
allow (GPTQ) is not used here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.algorithms.algorithm import Algorithm, Rounded, misfit
from roundel.algorithms.inputs import NOT_IN_FILE, mean_squares
from roundel.errors import RecipeError
from roundel.scheme import Grid
from roundel.unit import Inputs, Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.ops.search import Searched

__all__ = ["OptRtn"]

WIDENED = 0.25  # at 2 bits: most of what widening wins in perplexity, for a sixteenth of what it costs
FLOOR = 1e-6  # of the mean: the least importance of a channel, for one that was silent may speak elsewhere


@dataclass(frozen=True, kw_only=True)
class OptRtn(Algorithm):
    """Rounding to nearest with searched scales.

    imatrix      weights are counted by the mean square of the inputs they meet: measured on data, or as they stand in
                 the file of llama.cpp that is named
    unbiased     how far scales are then widened towards those under which rounded weights are as long as the weights
                 (`ops.unbiased`), 0 to 1: single weights err a little more and outputs shrink less. None: 0.25 for
                 integers of 2 bits, which costs a hundredth of the error; else 0
    min_tokens   with imatrix: a layer that saw fewer is searched as without
    """

    name: ClassVar[str] = "opt-rtn"
    summary: ClassVar[str] = "round to nearest, scales searched for least error; no data needed, a minute"
    paper: ClassVar[str] = "the search of llama.cpp's make_qx_quants and auto-round's optimized RTN, made nearly exact"

    imatrix: bool | str = False
    unbiased: float | None = None
    min_tokens: int = 64

    def __post_init__(self) -> None:
        if self.unbiased is not None and not 0 <= self.unbiased <= 1:
            raise RecipeError(f"opt-rtn: unbiased={self.unbiased} is not possible: it is 0 to 1.")
        if self.min_tokens < 1:
            raise RecipeError(f"opt-rtn: min_tokens={self.min_tokens} is not possible: it is at least 1.")

    @property
    def reads_activations(self) -> bool:
        return self.imatrix is True

    @property
    def measures_importances(self) -> bool:
        return self.reads_activations

    def refuse(self, layer: Layer) -> str | None:
        grid = layer.scheme.weight
        if grid.is_plain_integer or grid.rule == "ggml":
            known = True
        else:
            known = grid.is_mx or (grid.element.name == "e2m1" and isinstance(grid.scale, Grid))
        if grid.block[0] != 1 or not known:
            return f"opt-rtn rounds to integers, MX floats, NVFP4 and ggml's types, not to {layer.scheme.name}"
        if self.unbiased and not grid.is_plain_integer:
            return f"opt-rtn widens scales of integers (unbiased), not of {layer.scheme.name}"
        return misfit(layer)

    def quantize(self, unit: Unit) -> dict[str, Rounded]:
        import torch

        measured = self.reads_activations
        inputs = mean_squares(unit, "quantized") if measured else unit.known
        # A unit with inputs is alone; units without are handed to as many workers as there are cores.
        threads = torch.get_num_threads() if measured else 1
        return {layer.name: self._one(unit, layer, inputs.get(layer.name), threads) for layer in unit.layers}

    def _one(self, unit: Unit, layer: Layer, inputs: Inputs | None, threads: int) -> Rounded:
        importance, fallback = None, None
        tokens = inputs.tokens if inputs is not None else 0
        if inputs is not None and (tokens is None or tokens >= self.min_tokens):
            importance = inputs.mean_square.clamp(min=FLOOR * float(inputs.mean_square.mean())).to(
                unit.weights[layer.tensor].device
            )
        elif inputs is None and isinstance(self.imatrix, str):
            fallback = f"{NOT_IN_FILE}: searched without importances"
        elif self.imatrix:
            seen = f"{tokens} tokens reached it, fewer than {self.min_tokens}" if tokens else "no token reached it"
            fallback = f"{seen}: searched without their weight"
        weight, reach = unit.weight(layer), unit.reach.get(layer.name)
        found = self.search(weight, layer.scheme.weight, importance, threads, reach)
        return Rounded(
            tensor=found.tensor,
            error=found.error,
            baseline=found.baseline,
            tokens=tokens if self.imatrix else None,
            fallback=fallback,
            inputs=inputs if self.reads_activations else None,
        )

    def search(
        self, weight: Tensor, grid: Grid, importance: Tensor | None = None, threads: int = 1, reach: float | None = None
    ) -> Searched:
        """`ops.search`, then `unbiased`; left as found where nobody asked for it and plain rounding would be better."""
        from roundel.ops.search import search
        from roundel.ops.unbiased import unbiased
        from roundel.ops.weighted_error import squared_error

        found = search(weight, grid, importance, threads, reach)
        few = grid.is_plain_integer and grid.element.bits <= 2
        share = self.unbiased if self.unbiased is not None else WIDENED if few else 0.0
        if not share:
            return found
        widened = unbiased(weight, found.tensor, importance, share)
        error = squared_error(weight, widened, importance)
        if self.unbiased is None and error > found.baseline:
            return found
        return replace(found, tensor=widened, error=error)
