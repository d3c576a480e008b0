"""Weights as they come out of rounding, for losses: at a layer's own bits, group size and symmetry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from roundel.scheme import Grid
from roundel.unit import Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["refusal", "round_trip", "rounded_weights", "straight_through"]


def refusal(layer: Layer) -> str | None:
    """Why plain rounding, and with it a loss of rounding, has no meaning on a layer's grid; None where it has."""
    grid = layer.scheme.weight
    if grid.block[0] != 1 or not (grid.is_plain_integer or grid.is_mx):
        return f"losses are of rounding to integers and MX floats, not to {layer.scheme.name}"
    return None


def round_trip(weight: Tensor, grid: Grid) -> Tensor:
    """`encode(weight, grid).decode()`, [out, in] float32: the same numbers, without spreading scales over weights."""
    import torch

    from roundel.ops.encode import encode

    found = encode(weight, grid)
    out, width = found.shape
    columns = grid.block_of((out, width))[1]
    if not grid.element.is_integer or width % columns or not isinstance(found.scale, torch.Tensor):
        return found.decode()
    values = found.codes.float().view(out, -1, columns)
    if found.zero is not None:
        values.sub_(found.zero.float()[..., None])
    return values.mul_(found.scale.float()[..., None]).view(out, width)


def straight_through(weight: Tensor, grid: Grid) -> Tensor:
    """`round_trip` with a gradient. [out, in], float32.

    Q(w) = w + scale(w) · c, where c is what rounding and clamping add, in steps of the grid. c is taken for a constant
    (Bengio et al., arXiv 1308.3432), scale is not: it follows its group's largest weight (symmetric) or its largest and
    smallest (asymmetric), so that a step that widens a group's range is seen to coarsen all of the group. Powers of
    two do not follow anything: there Q(w) = w + constant.
    """
    rounded = round_trip(weight.detach(), grid)
    if not grid.element.is_integer:
        return weight + (rounded - weight.detach())
    return weight + (rounded - weight.detach()) + _through_scale(weight, rounded, grid)


def rounded_weights(unit: Unit, weights: Mapping[str, Tensor], layers: Sequence[Layer]) -> dict[str, Tensor]:
    """`weights` with these layers rounded, gradients passing straight through."""
    return {
        **weights,
        **{layer.tensor: straight_through(weights[layer.tensor], layer.scheme.weight) for layer in layers},
    }


def _through_scale(weight: Tensor, rounded: Tensor, grid: Grid) -> Tensor:
    """A zero whose gradient is that of scale(w) · c with c held fast."""
    from roundel.ops.fit import grouped

    columns = grid.block_of((weight.shape[0], weight.shape[1]))[1]
    groups = grouped(weight, columns)
    codes = 2**grid.element.bits
    if grid.symmetric:
        span = groups.abs().amax(-1, keepdim=True) / (codes / 2)
    else:
        span = (groups.amax(-1, keepdim=True).clamp(min=0) - groups.amin(-1, keepdim=True).clamp(max=0)) / (codes - 1)
    added = grouped(rounded - weight.detach(), columns) / span.detach().clamp(min=1e-12)
    moving: Tensor = (span - span.detach()) * added
    return moving.flatten(1)[:, : weight.shape[1]]
