"""GPTQ: columns are rounded one after the other, and those not yet rounded answer the errors of those that are.

Frantar et al. 2022, arXiv:2210.17323. The arithmetic is in `ops.hessian` (the Hessian's factors), `ops.column_order`
and `ops.feedback`. What this file adds: Hessians are collected stage by stage, so that later layers of a block see
what earlier ones, already rounded, hand on (true_sequential); layers handed the same tensor share one Hessian; and a
layer that saw too little is rounded plainly and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from roundel.algorithms.algorithm import Algorithm, Rounded
from roundel.algorithms.hessians import Collector, Hessian, stages
from roundel.errors import RecipeError
from roundel.scheme import Grid
from roundel.tensor import QuantizedTensor
from roundel.unit import Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.ops.column_order import Arrangement
    from roundel.ops.feedback import Scales
    from roundel.ops.hessian import Factors

__all__ = ["Gptq", "gptq"]

SLAB_BYTES = 64 << 20  # of float32 weights that are rounded at a time
MEASURED_ROWS = 256  # of a layer, evenly spread, in which errors are measured


def gptq(
    weight: Tensor,
    factors: Factors,
    arrangement: Arrangement,
    grid: Grid,
    *,
    trials: int,
    block_size: int,
) -> QuantizedTensor:
    """Round a matrix [out, in] with feedback.

    factors       of the Hessian of its inputs, in the arrangement's order
    trials        shares of each group's range that are tried as scales, before finer ones around the best; 0: the range
    block_size    columns whose feedback to later ones is summed at once; changes speed, not what is computed
    """
    import torch

    from roundel.ops.feedback import round_columns, static_scales

    out, width = weight.shape
    order, columns = arrangement.order, grid.block_of((out, width))[1]
    places = torch.empty_like(order)
    places[order] = torch.arange(width, device=weight.device)
    codes = torch.empty((out, width), dtype=torch.uint8, device=weight.device)
    used: list[Scales] = []
    rows = max(64, SLAB_BYTES // (4 * width) // 64 * 64)
    for start in range(0, out, rows):
        slab = weight[start : start + rows].float()
        fixed = None
        if arrangement.static:
            fixed = static_scales(slab.T.contiguous(), factors.strength[places], columns, grid, trials)
        ordered = slab[:, order].T.contiguous()
        found, scales = round_columns(
            ordered, factors, arrangement, grid, fixed=fixed, trials=trials, block_size=block_size
        )
        codes[start : start + rows] = found[places].T
        used.append(scales)
    return _assembled(codes, used, grid, arrangement.group_index)


@dataclass(frozen=True, kw_only=True)
class Gptq(Algorithm):
    """Rounding with feedback.

    damping          share of the Hessian's mean diagonal that is added to its diagonal, at least (paper: percdamp)
    shrinkage        damping is raised to what the number and the spread of tokens call for (Ledoit and Wolf 2004)
    damping_step     added to damping, twice as much each time, while the Hessian is not positive definite
    act_order        columns with large inputs first, whatever their group; stores a group index beside the codes
    static_groups    scales are fixed before the first column is rounded; with act_order, no group index is stored
    group_order      groups with large inputs first, and columns with large inputs first within each; act_order goes
                     before it
    true_sequential  a block's later layers see what its earlier ones, rounded, hand on
    block_size       columns whose feedback to later ones is summed at once: speed only
    trials           shares of each group's range tried as scales before finer ones around the best; 0 takes the range
    min_tokens       a layer that saw fewer is rounded plainly
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "column by column, later columns answer earlier errors; needs data, minutes"
    paper: ClassVar[str] = "Frantar et al. 2022, arXiv:2210.17323"

    damping: float = 0.01
    shrinkage: bool = True
    damping_step: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    group_order: bool = True
    true_sequential: bool = True
    block_size: int = 128
    trials: int = 4
    min_tokens: int = 16

    def __post_init__(self) -> None:
        for name, value, least in (
            ("damping", self.damping, 0.0),
            ("damping_step", self.damping_step, 1e-6),
            ("block_size", self.block_size, 1),
            ("trials", self.trials, 0),
            ("min_tokens", self.min_tokens, 1),
        ):
            if not value >= least:
                raise RecipeError(f"gptq: {name}={value} is not possible: it is at least {least:g}.")
        if self.damping > 1:
            raise RecipeError(f"gptq: damping={self.damping} is not possible: it is a share of the mean, 0 to 1.")

    @property
    def reads_activations(self) -> bool:
        return True

    @property
    def permutes(self) -> bool:
        """Whether groups do not lie side by side, so that a format has to store each column's (Layer.permuted)."""
        return self.act_order and not self.static_groups

    def passes(self, samples: int, batch: int) -> float:
        return 5.0 if self.true_sequential else 3.0

    @property
    def copies(self) -> float:
        return 1.25

    def refuse(self, layer: Layer) -> str | None:
        grid = layer.scheme.weight
        if grid.block[0] != 1 or not (grid.is_plain_integer or grid.is_mx):
            return f"gptq rounds to integers and MX floats, not to {layer.scheme.name}"
        if self.permutes and not grid.element.is_integer:
            return f"{layer.scheme.name} has no room for a group index: act_order takes static_groups with it"
        return None

    def quantize(self, unit: Unit) -> dict[str, Rounded]:
        entering, layers = unit.entering(), {layer.name: layer for layer in unit.layers}
        budget = sum(4 * layer.parameters for layer in unit.layers)  # as much as the unit's weights
        rounded: dict[str, Rounded] = {}

        def observe(names: Sequence[str], weights: Mapping[str, QuantizedTensor], budget: int) -> Collector:
            """Run the inputs through the unit and round what there is room for."""
            collector = Collector(budget)
            entering.observe(collector.see, weights, modules=names, stream="quantized")
            for hessian in collector.finish():
                here = [layers[name] for name in names if name in hessian.layers]
                rounded.update(self.round(unit, here, hessian))
                entering.tick(len(rounded) / len(layers), f"{len(rounded)} of {len(layers)} layers")
            return collector

        # The first pass also shows in which order layers are called, and which are handed the same tensor.
        weights: dict[str, QuantizedTensor] = {}
        first = observe(list(layers), weights, 0 if self.true_sequential else budget)
        done: set[str] = set()
        for stage in stages(first.inputs) if self.true_sequential else [list(first.inputs)]:
            if self.true_sequential:
                new = [name for name in rounded if name not in done]
                weights |= {layers[name].tensor: rounded[name].tensor for name in new}
                done.update(new)
            left = [name for name in stage if name in first.left]
            while left:
                again = observe(left, weights, budget)
                left = [name for name in left if name in again.left]
        for layer in unit.layers:
            if layer.name not in rounded:
                rounded[layer.name] = _plainly(unit, layer, 0, "no token reached it")
        return rounded

    def round(self, unit: Unit, layers: Sequence[Layer], hessian: Hessian) -> dict[str, Rounded]:
        """Layers that share a Hessian, whose memory is used up."""
        from roundel.ops.column_order import arrange
        from roundel.ops.hessian import factorize, fitting_damping

        if hessian.tokens < self.min_tokens:
            why = f"{hessian.tokens} tokens reached it, fewer than {self.min_tokens}"
            return {layer.name: _plainly(unit, layer, hessian.tokens, why) for layer in layers}
        found: dict[str, Rounded] = {}
        by_group: dict[int, list[Layer]] = {}
        for layer in layers:
            by_group.setdefault(layer.scheme.weight.block_of(layer.shape)[1], []).append(layer)
        diagonal = hessian.total.diagonal().clone()
        useless = "no damping makes its Hessian positive definite" if diagonal.any() else "nothing but zeros entered it"
        damping = self.damping
        if self.shrinkage:
            damping = max(damping, fitting_damping(hessian.total, hessian.fourth, hessian.tokens))
        for number, (columns, alike) in enumerate(by_group.items(), 1):
            arrangement = arrange(
                diagonal,
                columns,
                act_order=self.act_order,
                static_groups=self.static_groups,
                group_order=self.group_order,
            )
            total = hessian.total if number == len(by_group) else hessian.total.clone()
            factors = factorize(total, arrangement.order, damping, self.damping_step)
            for layer in alike:
                found[layer.name] = (
                    _plainly(unit, layer, hessian.tokens, useless)
                    if factors is None
                    else self._one(unit, layer, factors, arrangement, hessian.tokens, _raised(factors, damping))
                )
        return found

    def _one(
        self,
        unit: Unit,
        layer: Layer,
        factors: Factors,
        arrangement: Arrangement,
        tokens: int,
        note: str | None,
    ) -> Rounded:
        weight, grid = unit.weights[layer.tensor], layer.scheme.weight  # widened a slab at a time
        tensor = gptq(weight, factors, arrangement, grid, trials=self.trials, block_size=self.block_size)
        error, baseline = _errors(weight, tensor, factors)
        if error > baseline:
            return replace(_plainly(unit, layer, tokens, "plain rounding errs less"), error=baseline, baseline=baseline)
        return Rounded(tensor=tensor, error=error, baseline=baseline, tokens=tokens, note=note)


def _raised(factors: Factors, damping: float) -> str | None:
    """What to say where the damping asked for was not enough."""
    if factors.damping <= damping:
        return None
    return f"damping raised from {damping:.3g} to {factors.damping:.3g}, for its Hessian was not positive definite"


def _plainly(unit: Unit, layer: Layer, tokens: int, why: str) -> Rounded:
    from roundel.ops.encode import encode

    tensor = encode(unit.weight(layer), layer.scheme.weight)
    return Rounded(tensor=tensor, tokens=tokens, fallback=f"{why}: rtn")


def _errors(weight: Tensor, tensor: QuantizedTensor, factors: Factors) -> tuple[float, float]:
    """tr(E H E^T) / tr(W H W^T), H damped, of this rounding and of plain rounding, over the measured rows."""
    import torch

    from roundel.ops.encode import encode
    from roundel.ops.hessian import proxy_loss

    rows = torch.linspace(
        0, len(weight) - 1, min(MEASURED_ROWS, len(weight)), dtype=torch.float32, device=weight.device
    ).long()
    exact = weight[rows].float()
    plainly = encode(exact, tensor.grid)
    size, error, baseline = (
        float(proxy_loss(matrix[:, factors.order].T.contiguous(), factors).sum())
        for matrix in (exact, exact - tensor.rows(rows).decode(), exact - plainly.decode())
    )
    size = max(size, 1e-30)  # weights may all be zero
    return error / size, baseline / size


def _assembled(codes: Tensor, scales: Sequence[Scales], grid: Grid, group_index: Tensor | None) -> QuantizedTensor:
    """Codes [out, in] as bytes, scales of slabs of rows -> the matrix."""
    import torch

    scale = torch.cat([s.scale.T for s in scales])
    if grid.scale == "E8M0":
        exponents = (torch.frexp(scale).exponent + 126).to(torch.uint8)
        typed = codes if grid.element.name == "e2m1" else codes.view(torch.float8_e4m3fn)
        return QuantizedTensor(grid=grid, codes=typed, scale=exponents.view(torch.float8_e8m0fnu))
    zero = None if grid.symmetric else (-torch.cat([s.lowest.T for s in scales])).to(torch.uint8)
    return QuantizedTensor(
        grid=grid,
        codes=codes.view(torch.int8) if grid.symmetric else codes,
        scale=scale.half(),
        zero=zero,
        group_index=group_index,
    )
