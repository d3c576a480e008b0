"""HQQ: scales and zero points by half-quadratic splitting, without data.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". The solver, and how it differs
from theirs, is in `ops.half_quadratic`: zero points are whole numbers, which GPTQ, AWQ and compressed-tensors files
hold, or floats on the grids of HQQ's own (`W4A16_HQQ`). Groups lie along the input, as in all formats (theirs may be
strided over the matrix). Weights are solved in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from roundel.algorithms.algorithm import Algorithm, Rounded
from roundel.errors import RecipeError
from roundel.unit import Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.tensor import QuantizedTensor

__all__ = ["Hqq", "eight_bits"]


@dataclass(frozen=True, kw_only=True)
class Hqq(Algorithm):
    """The p-norm of the weights' errors, made small by shrinking and least squares in turn.

    iterations    of both steps; a block that no longer changes stops earlier
    norm          p of the norm that counts, above 0, at most 1
    beta          how strongly the shrunk errors are held to the real ones, at the start
    kappa         growth of beta in each iteration, at least 1
    quant_scale   scales are stored as they come out of 8 bits, `meta_group` of them sharing a range; the sign of a
                  symmetric scale stays
    quant_zero    zero points pass through 8 bits too; whole ones have at most 8, and stay as they are
    meta_group    scales or zero points (row by row, along the input) that share a range
    """

    name: ClassVar[str] = "hqq"
    summary: ClassVar[str] = "scales and zero points by half-quadratic splitting; no data, a minute"
    paper: ClassVar[str] = "Badri & Shaji 2023, mobiusml.github.io/hqq_blog"

    iterations: int = 20
    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    quant_scale: bool = False
    quant_zero: bool = False
    meta_group: int = 128

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("iterations", self.iterations >= 1, "at least 1"),
            ("norm", 0 < self.norm <= 1, "above 0 and at most 1"),
            ("beta", self.beta > 0, "above 0"),
            ("kappa", self.kappa >= 1, "at least 1"),
            ("meta_group", self.meta_group >= 1, "at least 1"),
        ):
            if not value:
                raise RecipeError(f"hqq: {name}={getattr(self, name)} is not possible: it is {allowed}.")

    @property
    def reads_activations(self) -> bool:
        return False

    def refuse(self, layer: Layer) -> str | None:
        grid = layer.scheme.weight
        if grid.block[0] != 1 or not (grid.is_plain_integer or grid.has_float_zeros):
            return f"hqq fits scales and zero points of integers, not {layer.scheme.name}"
        return None

    def quantize(self, unit: Unit) -> dict[str, Rounded]:
        return {layer.name: self._one(unit.weight(layer), layer) for layer in unit.layers}

    def _one(self, weight: Tensor, layer: Layer) -> Rounded:
        from roundel.ops.encode import encode_scaled
        from roundel.ops.half_quadratic import Splitting, norm_error, solve

        how = Splitting(iterations=self.iterations, norm=self.norm, beta=self.beta, kappa=self.kappa)
        found = solve(weight, layer.scheme.weight, how)
        moves_zeros = self.quant_zero and layer.scheme.weight.has_float_zeros
        if not self.quant_scale and not moves_zeros:
            return Rounded(tensor=found.tensor, error=found.error, baseline=found.baseline)
        scale, zero = found.tensor.scale, found.tensor.zero
        if self.quant_scale:
            scale = _scales_in_eight_bits(found.tensor, self.meta_group)
        if moves_zeros:
            assert zero is not None
            zero = eight_bits(zero.float(), self.meta_group).half()
        tensor = encode_scaled(weight, found.tensor.grid, scale, zero)  # the codes anew
        return Rounded(tensor=tensor, error=norm_error(weight, tensor, self.norm), baseline=found.baseline)


def _scales_in_eight_bits(found: QuantizedTensor, group: int) -> Tensor:
    """Scales that 8 bits can tell apart."""
    import torch

    assert isinstance(found.scale, torch.Tensor)
    scale = found.scale.float()
    sizes = eight_bits(scale.abs(), group)
    return torch.where(scale < 0, -sizes, sizes).half()


def eight_bits(values: Tensor, group: int) -> Tensor:
    """Values, each moved to the nearest of 256 that are spread evenly over its group's range.

    values   any shape, float32; groups of `group` follow one another in memory order, the last may be short
    """
    import torch

    flat = values.flatten()
    rest = -len(flat) % group
    padded = torch.cat([flat, flat[-1:].expand(rest)]).view(-1, group)
    lowest = padded.amin(1, keepdim=True)
    step = (padded.amax(1, keepdim=True) - lowest) / 255
    codes = torch.where(step > 0, torch.round((padded - lowest) / step), 0.0)
    return (lowest + codes * step).flatten()[: len(flat)].view(values.shape)
