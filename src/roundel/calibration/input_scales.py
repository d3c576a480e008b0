"""Scales of what enters layers, for schemes that store them: the largest input seen becomes the grid's largest value.

Source: the rule that llm-compressor's and auto-round's static schemes share. For FP8 that is max|x| / 448; where scales
of the inputs are quantized themselves (NVFP4) it is the factor of the whole tensor, max|x| / (6 * 448).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from roundel.scheme import Grid, Scheme
from roundel.unit import Layer, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from roundel.algorithms import Rounded

__all__ = ["with_input_scales"]


def with_input_scales(unit: Unit, rounded: Mapping[str, Rounded]) -> dict[str, Rounded]:
    """The results with the scale of its inputs put to every layer that stores one. One pass over the inputs, if any.

    An expert that no token reached gets the largest of its siblings' scales, and says so.
    """
    layers = [layer for layer in unit.layers if layer.scheme.stores_input_scale]
    if not layers:
        return dict(rounded)
    largest = _largest_inputs(unit, [layer.name for layer in layers])
    found = dict(rounded)
    for layer in layers:
        own = largest.get(layer.name)
        note = None
        if own is None:
            near = [value for name, value in largest.items() if _unnumbered(name) == _unnumbered(layer.name)]
            own, note = max(near, default=0.0), "no token reached it: its inputs are scaled as its siblings'"
        result = found[layer.name]
        scaled = replace(result.tensor, input_scale=_scale(layer, own, result.tensor.codes))
        found[layer.name] = replace(result, tensor=scaled, note=result.note or note)
    return found


def _largest_inputs(unit: Unit, names: list[str]) -> dict[str, float]:
    """max|x| of what enters each of these layers that any token reaches."""
    found: dict[str, float] = {}

    def see(name: str, x: Tensor) -> None:
        if x.numel():
            found[name] = max(found.get(name, 0.0), float(x.abs().max()))

    unit.entering().observe(see, unit.weights, modules=names, stream="quantized")
    return found


def _scale(layer: Layer, largest: float, like: Tensor) -> Tensor:
    """[1] float32; 1 where nothing but zeros was seen."""
    import torch

    return torch.tensor([largest / _largest_value(layer.scheme) or 1.0], dtype=torch.float32, device=like.device)


def _largest_value(scheme: Scheme) -> float:
    grid = scheme.input
    assert grid is not None
    return grid.element.hi * (grid.scale.element.hi if isinstance(grid.scale, Grid) else 1.0)


def _unnumbered(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".#", name)
